// A proxy between a client and the server that lets requests through, and WebSockets only when it is told to.

import { Relay } from "./relay.mjs";

const REFUSAL = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

export class Blocked extends Relay {
  constructor(server) {
    super(server);
    this.lets = { webSockets: false };
    this.refused = 0;
  }

  /** Looks at the first bytes of each connection: a handshake has one of its own. */
  admit(first) {
    if (this.lets.webSockets || !/^upgrade: websocket/im.test(first.toString("latin1"))) return true;
    this.refused += 1;
    return false;
  }

  refuse(near) {
    near.end(REFUSAL);
  }
}

/** One that never answers a handshake, as some do. */
export class Silent extends Blocked {
  refuse() {}
}
