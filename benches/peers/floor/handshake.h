// A server's side of the WebSocket handshake and of a frame.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static uint32_t rol(uint32_t x, int n) { return (x << n) | (x >> (32 - n)); }
static void sha1(const uint8_t *d, size_t n, uint8_t out[20]) {
    uint32_t h[5] = {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0};
    size_t tot = ((n + 8) / 64 + 1) * 64;
    uint8_t *m = calloc(1, tot);
    memcpy(m, d, n);
    m[n] = 0x80;
    uint64_t bits = (uint64_t)n * 8;
    for (int i = 0; i < 8; i++)
        m[tot - 1 - i] = (uint8_t)(bits >> (8 * i));
    for (size_t o = 0; o < tot; o += 64) {
        uint32_t w[80];
        for (int i = 0; i < 16; i++)
            w[i] = (uint32_t)m[o + 4 * i] << 24 | (uint32_t)m[o + 4 * i + 1] << 16 | (uint32_t)m[o + 4 * i + 2] << 8 |
                   m[o + 4 * i + 3];
        for (int i = 16; i < 80; i++)
            w[i] = rol(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
        uint32_t a = h[0], b = h[1], c = h[2], e = h[4], dd = h[3];
        for (int i = 0; i < 80; i++) {
            uint32_t f, k;
            if (i < 20) {
                f = (b & c) | (~b & dd);
                k = 0x5A827999;
            } else if (i < 40) {
                f = b ^ c ^ dd;
                k = 0x6ED9EBA1;
            } else if (i < 60) {
                f = (b & c) | (b & dd) | (c & dd);
                k = 0x8F1BBCDC;
            } else {
                f = b ^ c ^ dd;
                k = 0xCA62C1D6;
            }
            uint32_t t = rol(a, 5) + f + e + k + w[i];
            e = dd;
            dd = c;
            c = rol(b, 30);
            b = a;
            a = t;
        }
        h[0] += a;
        h[1] += b;
        h[2] += c;
        h[3] += dd;
        h[4] += e;
    }
    free(m);
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 4; j++)
            out[4 * i + j] = (uint8_t)(h[i] >> (24 - 8 * j));
}
static void b64_20(const uint8_t *d, char *o) {
    static const char *T = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int i = 0; i < 18; i += 3) {
        uint32_t v = d[i] << 16 | d[i + 1] << 8 | d[i + 2];
        *o++ = T[v >> 18];
        *o++ = T[v >> 12 & 63];
        *o++ = T[v >> 6 & 63];
        *o++ = T[v & 63];
    }
    uint32_t v = d[18] << 16 | d[19] << 8;
    *o++ = T[v >> 18];
    *o++ = T[v >> 12 & 63];
    *o++ = T[v >> 6 & 63];
    *o++ = '=';
    *o = 0;
}
static int ws_accept(const char *req, char *resp, size_t cap) { // builds the 101 response; 0 if no key
    const char *k = strcasestr(req, "sec-websocket-key:");
    if (!k)
        return 0;
    k += 18;
    while (*k == ' ')
        k++;
    const char *e = k;
    while (*e && *e != '\r' && *e != ' ')
        e++;
    if (e - k > 64)
        return 0;
    char s[128];
    size_t n = (size_t)(e - k);
    memcpy(s, k, n);
    memcpy(s + n, "258EAFA5-E914-47DA-95CA-C5AB0DC85B11", 36);
    uint8_t h[20];
    sha1((uint8_t *)s, n + 36, h);
    char b[32];
    b64_20(h, b);
    return snprintf(resp, cap,
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: "
                    "Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
                    b);
}
static size_t ws_frame(uint8_t *o, const char *p, size_t n) { // server text frame, unmasked
    size_t h;
    o[0] = 0x81;
    if (n < 126) {
        o[1] = (uint8_t)n;
        h = 2;
    } else if (n < 65536) {
        o[1] = 126;
        o[2] = (uint8_t)(n >> 8);
        o[3] = (uint8_t)n;
        h = 4;
    } else {
        o[1] = 127;
        for (int i = 0; i < 8; i++)
            o[2 + i] = (uint8_t)((uint64_t)n >> (56 - 8 * i));
        h = 10;
    }
    memcpy(o + h, p, n);
    return h + n;
}
