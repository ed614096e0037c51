// A relay between a client and the server, whose connections a test can cut.

import { once } from "node:events";
import net from "node:net";
import { Transform } from "node:stream";

export class Relay {
  constructor(server) {
    this.server = server;
    this.pairs = new Set();
    this.isCut = false;
  }

  async start() {
    this.listener = net.createServer((near) => {
      near.on("error", () => {});
      if (this.isCut) return near.resetAndDestroy();
      const far = net.connect(new URL(this.server.origin).port, "127.0.0.1");
      const pair = [near, far];
      this.pairs.add(pair);
      const end = () => {
        this.pairs.delete(pair);
        for (const socket of pair) socket.destroy();
      };
      for (const socket of pair) socket.on("error", () => {}).on("close", end);
      near.once("data", (first) => {
        if (!this.admit(first)) return this.refuse(near);
        far.write(first);
        this.carry(near, far);
        far.pipe(near);
      });
    });
    this.listener.listen(0, "127.0.0.1");
    await once(this.listener, "listening");
    this.origin = `http://127.0.0.1:${this.listener.address().port}`;
    return this;
  }

  /** Whether a connection that begins with these bytes is let through. */
  admit() {
    return true;
  }

  carry(near, far) {
    near.pipe(far);
  }

  /** Nothing comes through any more, and nobody is told. */
  freeze() {
    for (const pair of this.pairs) for (const socket of pair) socket.unpipe().pause();
  }

  /** Every connection is lost, without a goodbye, and no new one comes about. */
  cut() {
    this.isCut = true;
    for (const [near, far] of this.pairs) {
      near.resetAndDestroy();
      far.resetAndDestroy();
    }
  }

  mend() {
    this.isCut = false;
  }

  stop() {
    this.cut();
    this.listener.close();
  }
}

/** One that carries to the server no more than so many bytes a second. */
export class Slow extends Relay {
  bytesPerSecond = 1 << 20;

  carry(near, far) {
    const transform = (chunk, _encoding, done) => setTimeout(done, (chunk.length / this.bytesPerSecond) * 1000, null, chunk);
    near.pipe(new Transform({ transform })).pipe(far);
  }
}
