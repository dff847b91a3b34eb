import { Counter } from "prom-client";
import { describe, expect, it } from "vitest";
import { createLogger } from "./logging.ts";
import { createRegistry, serveMetrics } from "./metrics.ts";

describe("serveMetrics", () => {
  it("serves metrics and probes", async () => {
    const registry = createRegistry({ instance_id: "w1" });
    new Counter({ name: "kivimesh_things_total", help: "Things.", registers: [registry] }).inc(3);
    let ready = false;
    const server = await serveMetrics({ port: 0, registry, isReady: () => ready });
    const get = async (path: string, method = "GET") => {
      const response = await fetch(`${server.url}${path}`, { method });
      return [response.status, await response.text()] as const;
    };
    const [status, text] = await get("/metrics");
    expect(status).toBe(200);
    expect(text).toContain('kivimesh_things_total{instance_id="w1"} 3');
    expect(text).toContain("process_resident_memory_bytes");
    expect((await get("/healthz"))[0]).toBe(200);
    expect((await get("/readyz"))[0]).toBe(503);
    ready = true;
    expect((await get("/readyz?x=1"))[0]).toBe(200);
    expect((await get("/other"))[0]).toBe(404);
    expect((await get("/metrics", "POST"))[0]).toBe(405);
    await expect(serveMetrics({ port: server.port, registry })).rejects.toThrow(/EADDRINUSE/);
    await server.close();
    await expect(get("/healthz")).rejects.toThrow();
  });
});

describe("createLogger", () => {
  it("never writes prompts, completions or secrets", () => {
    const lines: string[] = [];
    const logger = createLogger("test", "info", { write: (line) => void lines.push(line) });
    logger.info(
      { prompt: "PRIVATE", request: { messages: ["PRIVATE"], job: { tokens: [4242] } }, id: "r1" },
      "request",
    );
    logger.info({ config: { clusterSecret: "PRIVATE" } });
    expect(lines.join("")).not.toMatch(/PRIVATE|4242/);
    expect(JSON.parse(lines[0]!)).toMatchObject({ name: "test", id: "r1", prompt: "[redacted]", msg: "request" });
  });
});
