/** A TCP proxy for tests that can stop passing bytes on without closing anything: a cut cable, or a stopped process. */
import { connect, createServer, type Socket } from "node:net";

export interface FreezingProxy {
  readonly address: string;
  freeze(): void;
  close(): void;
}

export async function freezingProxy(upstream: string): Promise<FreezingProxy> {
  const [host, port] = upstream.split(":");
  const sockets = new Set<Socket>();
  let frozen = false;
  const join = (from: Socket, to: Socket) => {
    sockets.add(from);
    from.on("data", (bytes) => {
      if (!frozen) to.write(bytes);
    });
    from.on("error", () => to.destroy());
    from.on("close", () => to.destroy());
  };
  const server = createServer((client) => {
    const server = connect(Number(port), host);
    join(client, server);
    join(server, client);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const bound = server.address();
  return {
    address: `127.0.0.1:${typeof bound === "object" ? bound?.port : 0}`,
    freeze() {
      frozen = true;
    },
    close() {
      for (const socket of sockets) socket.destroy();
      server.close();
    },
  };
}
