// npm `ws`, by its public API: every publish is sent to each tab.
import { createServer } from "node:http";
import { WebSocket, WebSocketServer } from "ws";

const server = createServer((request, response) => {
  const parts = [];
  request.on("data", (part) => parts.push(part));
  request.on("end", () => response.end(String(publish(Buffer.concat(parts)))));
});
server.keepAliveTimeout = 3_600_000;
server.requestTimeout = 0;
server.headersTimeout = 0;

const tabs = new WebSocketServer({ noServer: true, perMessageDeflate: false, maxPayload: 1 << 20 });
server.on("upgrade", (request, socket, head) => {
  socket.setNoDelay(true);
  tabs.handleUpgrade(request, socket, head, (tab) => tab.on("error", () => {}));
});

function publish(text) {
  let count = 0;
  for (const tab of tabs.clients) {
    if (tab.readyState === WebSocket.OPEN) {
      tab.send(text, { binary: false, compress: false });
      count += 1;
    }
  }
  return count;
}

server.listen({ port: Number(process.env.PORT), host: "127.0.0.1", backlog: 4096 });
