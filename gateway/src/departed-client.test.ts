import { once } from "node:events";
import { connect } from "node:net";
import { ClusterError, createLogger } from "@kivimesh/proto";
import { expect, it } from "vitest";
import { gatewayConfig } from "./config.ts";
import { httpServer } from "./http-server.ts";
import type { TextGenerator } from "./text-generation.ts";

it("a client that left before its request was handled is known to be gone", async () => {
  const config = gatewayConfig({ logLevel: "silent" }, () => "g");
  let told: (aborted: boolean) => void = () => {};
  const aborted = new Promise<boolean>((resolve) => {
    told = resolve;
  });
  // Only what is seen at the start of a generation matters here: none runs.
  const generator = {
    start: (_: unknown, signal: AbortSignal) => {
      told(signal.aborted);
      return Promise.reject(new ClusterError("CANCELLED", "the client has gone"));
    },
  } as unknown as TextGenerator;
  const unused = () => expect.unreachable();
  const { fastify, close } = httpServer({
    ...{ config, generator, log: createLogger("test", "silent"), dashboardPage: "" },
    ...{ models: () => [], model: unused, notReady: () => undefined, metrics: unused, dashboardState: unused },
  });
  // The client leaves between the parsing of its body and the handler.
  fastify.addHook("preHandler", async (_request, reply) => {
    socket.destroy();
    await once(reply.raw, "close");
  });
  await fastify.listen({ host: "127.0.0.1", port: 0 });
  const address = fastify.server.address();
  const socket = connect(typeof address === "object" ? (address?.port ?? 0) : 0, "127.0.0.1");
  const body = JSON.stringify({ model: "m", messages: [{ role: "user", content: "hi" }] });
  const head = `POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n`;
  socket.write(`${head}content-length: ${body.length}\r\n\r\n${body}`);
  expect(await aborted).toBe(true);
  await close(0);
});
