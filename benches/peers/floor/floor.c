// The limit: one thread, one epoll, one frame made once, a send() for each tab. PORT; SHUFFLED for a random order.
#include "handshake.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>
#define MAXFD 65536
#define MAXREQ (1 << 20)
typedef struct {
    uint8_t st;
    int idx;
    char *in;
    uint32_t inlen, incap;
    uint8_t *out;
    uint32_t outlen, outoff, outcap;
} Conn; // st: 0 free 1 http 2 ws
static Conn C[MAXFD];
static int subs[MAXFD], nsubs, ep;
static uint64_t dropped, eagain;
static void cclose(int fd) {
    Conn *c = &C[fd];
    if (c->st == 2) {
        int i = c->idx;
        subs[i] = subs[--nsubs];
        C[subs[i]].idx = i;
    }
    free(c->in);
    free(c->out);
    memset(c, 0, sizeof *c);
    close(fd);
}
static void arm(int fd, int out) {
    struct epoll_event e = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.fd = fd};
    epoll_ctl(ep, EPOLL_CTL_MOD, fd, &e);
}
static void keep(int fd, const uint8_t *p, size_t n) { // append the remainder, bounded at 1 MiB
    Conn *c = &C[fd];
    if (c->outlen - c->outoff + n > (1 << 20)) {
        dropped++;
        return;
    }
    int was = c->outlen > c->outoff;
    if (c->outoff) {
        memmove(c->out, c->out + c->outoff, c->outlen - c->outoff);
        c->outlen -= c->outoff;
        c->outoff = 0;
    }
    if (c->outlen + n > c->outcap) {
        c->outcap = (c->outlen + n) * 2;
        c->out = realloc(c->out, c->outcap);
    }
    memcpy(c->out + c->outlen, p, n);
    c->outlen += n;
    if (!was)
        arm(fd, 1);
}
static void flush_out(int fd) {
    Conn *c = &C[fd];
    while (c->outoff < c->outlen) {
        ssize_t r = send(fd, c->out + c->outoff, c->outlen - c->outoff, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (r < 0) {
            if (errno != EAGAIN)
                cclose(fd);
            return;
        }
        c->outoff += r;
    }
    free(c->out);
    c->out = NULL;
    c->outlen = c->outoff = c->outcap = 0;
    arm(fd, 0);
}
// With SHUFFLED, tabs are written in another order each time: what it costs to find each of them cold.
static int shuffled;
static int broadcast(const char *p, size_t n) {
    static uint8_t *f;
    static size_t cap;
    if (cap < n + 16) {
        cap = n + 16;
        f = realloc(f, cap);
    }
    size_t len = ws_frame(f, p, n);
    for (int i = 0; i < nsubs; i++) {
        if (shuffled) { // Fisher-Yates, a step at a time
            int j = i + rand() % (nsubs - i), fd = subs[i];
            subs[i] = subs[j];
            subs[j] = fd;
            C[subs[i]].idx = i;
            C[subs[j]].idx = j;
        }
        int fd = subs[i];
        if (__builtin_expect(C[fd].outlen > C[fd].outoff, 0)) {
            keep(fd, f, len);
            continue;
        }
        ssize_t r = send(fd, f, len, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (__builtin_expect(r == (ssize_t)len, 1))
            continue;
        if (r < 0) {
            if (errno != EAGAIN)
                continue;
            r = 0;
        }
        eagain++;
        keep(fd, f + r, len - r);
    }
    return nsubs;
}
static void on_http(int fd) {
    Conn *c = &C[fd];
    for (;;) {
        c->in[c->inlen] = 0;
        char *e = memmem(c->in, c->inlen, "\r\n\r\n", 4);
        if (!e)
            return;
        size_t hl = (size_t)(e + 4 - c->in);
        char save = *e;
        char resp[512];
        *e = 0;
        if (!strncmp(c->in, "POST /pub", 9)) {
            const char *k = strcasestr(c->in, "content-length:");
            size_t bl = k ? strtoul(k + 15, NULL, 10) : 0;
            *e = save;
            if (bl > MAXREQ - 8192) {
                cclose(fd);
                return;
            }
            if (c->inlen < hl + bl)
                return;
            int s = broadcast(c->in + hl, bl);
            char b[128];
            int bn = snprintf(b, sizeof b, "{\"sent\":%d,\"eagain\":%lu,\"dropped\":%lu}", s, eagain, dropped);
            int n =
                snprintf(resp, sizeof resp,
                         "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", bn, b);
            send(fd, resp, n, MSG_DONTWAIT | MSG_NOSIGNAL);
            memmove(c->in, c->in + hl + bl, c->inlen - hl - bl);
            c->inlen -= hl + bl;
            if (!c->inlen)
                return;
            continue;
        }
        int n = ws_accept(c->in, resp, sizeof resp);
        if (!n) {
            const char *m = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
            send(fd, m, strlen(m), MSG_DONTWAIT | MSG_NOSIGNAL);
            cclose(fd);
            return;
        }
        send(fd, resp, n, MSG_DONTWAIT | MSG_NOSIGNAL);
        free(c->in);
        c->in = NULL;
        c->inlen = c->incap = 0;
        c->st = 2;
        c->idx = nsubs;
        subs[nsubs++] = fd;
        return;
    }
}
int main(void) {
    signal(SIGPIPE, SIG_IGN);
    struct rlimit rl;
    getrlimit(RLIMIT_NOFILE, &rl);
    rl.rlim_cur = rl.rlim_max;
    setrlimit(RLIMIT_NOFILE, &rl);
    shuffled = getenv("SHUFFLED") != NULL;
    int port = getenv("PORT") ? atoi(getenv("PORT")) : 9112, one = 1;
    int lf = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(lf, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = {.sin_family = AF_INET,
                            .sin_port = htons(port),
                            .sin_addr.s_addr = inet_addr(getenv("HOST") ? getenv("HOST") : "127.0.0.1")};
    if (bind(lf, (void *)&a, sizeof a) || listen(lf, 4096)) {
        perror("bind");
        return 1;
    }
    ep = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = lf}, ev[1024];
    epoll_ctl(ep, EPOLL_CTL_ADD, lf, &e);
    fprintf(stderr, "floor on %d\n", port);
    static char junk[65536];
    for (;;) {
        int n = epoll_wait(ep, ev, 1024, -1);
        for (int i = 0; i < n; i++) {
            int fd = ev[i].data.fd;
            if (fd == lf) {
                int s;
                while ((s = accept4(lf, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
                    if (s >= MAXFD) {
                        close(s);
                        continue;
                    }
                    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    memset(&C[s], 0, sizeof C[s]);
                    C[s].st = 1;
                    struct epoll_event x = {.events = EPOLLIN, .data.fd = s};
                    epoll_ctl(ep, EPOLL_CTL_ADD, s, &x);
                }
                continue;
            }
            Conn *c = &C[fd];
            if (!c->st)
                continue;
            if (ev[i].events & EPOLLOUT) {
                flush_out(fd);
                if (!C[fd].st)
                    continue;
            }
            if (ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
                if (c->st == 2) {
                    ssize_t r = recv(fd, junk, sizeof junk, MSG_DONTWAIT);
                    if (r == 0 || (r < 0 && errno != EAGAIN) || (r > 0 && (junk[0] & 15) == 8))
                        cclose(fd);
                } else {
                    if (c->incap < c->inlen + 4097) {
                        c->incap = c->incap ? c->incap * 2 : 8192;
                        if (c->incap > 2 * MAXREQ) {
                            cclose(fd);
                            continue;
                        }
                        c->in = realloc(c->in, c->incap);
                    }
                    ssize_t r = recv(fd, c->in + c->inlen, c->incap - c->inlen - 1, MSG_DONTWAIT);
                    if (r == 0 || (r < 0 && errno != EAGAIN)) {
                        cclose(fd);
                        continue;
                    }
                    if (r > 0) {
                        c->inlen += r;
                        on_http(fd);
                    }
                }
            }
        }
    }
}
