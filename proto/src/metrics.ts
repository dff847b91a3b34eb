import { createServer, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { collectDefaultMetrics, Registry } from "prom-client";
import { hostAndPort } from "./grpc-channel.ts";

/** A Prometheus registry with the process's own metrics; `labels` go on every series. */
export function createRegistry(labels: Record<string, string> = {}): Registry {
  const registry = new Registry();
  registry.setDefaultLabels(labels);
  collectDefaultMetrics({ register: registry });
  return registry;
}

export interface MetricsServerOptions {
  /** Default 127.0.0.1. The pages hold no user data, and are served in the clear. */
  host?: string;
  /** 0: any free port. */
  port: number;
  registry: Registry;
  /** What /readyz answers: 200 or 503. Default: always ready. */
  isReady?: () => boolean;
}

export interface MetricsServer {
  readonly port: number;
  readonly url: string;
  close(): Promise<void>;
}

/** Serves `/metrics` (Prometheus text), `/healthz` (200 while the process lives) and `/readyz`. */
export async function serveMetrics(options: MetricsServerOptions): Promise<MetricsServer> {
  const host = options.host ?? "127.0.0.1";
  const server = createServer((request, response) => {
    const path = request.url?.split("?")[0];
    if (request.method !== "GET" && request.method !== "HEAD") {
      answer(response, 405, "only GET is allowed");
    } else if (path === "/metrics") {
      options.registry.metrics().then(
        (text) => answer(response, 200, text, options.registry.contentType),
        (error: Error) => answer(response, 500, error.message),
      );
    } else if (path === "/healthz") {
      answer(response, 200, "ok");
    } else if (path === "/readyz") {
      const ready = options.isReady?.() ?? true;
      answer(response, ready ? 200 : 503, ready ? "ready" : "not ready");
    } else {
      answer(response, 404, "not found: there are /metrics, /healthz and /readyz");
    }
  });
  await new Promise<void>((resolve, reject) => {
    server.once("error", reject);
    server.listen(options.port, host, resolve);
  });
  const { port } = server.address() as AddressInfo;
  return {
    port,
    url: `http://${hostAndPort(host, port)}`,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
}

function answer(response: ServerResponse, status: number, body: string, type = "text/plain; charset=utf-8"): void {
  response.writeHead(status, { "content-type": type }).end(`${body}\n`);
}
