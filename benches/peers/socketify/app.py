"""uWebSockets (C++) by its Python binding, with its own publish to a topic."""

import os

from socketify import App, CompressOptions, OpCode

app = App()
app.ws(
    "/ws",
    {
        "compression": CompressOptions.DISABLED,
        "max_payload_length": 1 << 20,
        "idle_timeout": 960,
        "max_backpressure": 1 << 20,
        "open": lambda tab: tab.subscribe("all"),
        "message": lambda tab, message, opcode: None,
    },
)


async def publish(response, request):
    app.publish("all", await response.get_text(), OpCode.TEXT)
    response.cork_end("1")


app.post("/pub", publish)
app.listen({"port": int(os.environ["PORT"]), "host": "127.0.0.1"}, lambda config: None)
app.run()
