import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { Cachestore } from "./gen/kivimesh/v1/cachestore_pb.ts";
import type { TlsFiles } from "./grpc-channel.ts";
import { createClient } from "./grpc-client.ts";
import { type GrpcServer, implementService, serveGrpc } from "./grpc-server.ts";

const cachestore = implementService(Cachestore, {
  lookup: async () => ({ held: 7 }),
  async *fetch() {},
  store: async () => ({}),
  release: async () => ({}),
  pin: async () => ({}),
  stats: async () => ({}),
  async *events() {},
});

let directory: string;
let ours: TlsFiles;
let strangers: TlsFiles;
let server: GrpcServer;

beforeAll(async () => {
  directory = mkdtempSync(join(tmpdir(), "kivimesh-tls-"));
  ours = certificates("ours");
  strangers = certificates("strangers");
  // Reachable by others: allowed, because it is not in the clear.
  server = await serveGrpc({ host: "0.0.0.0", port: 0, services: [cachestore], tls: ours });
});

afterAll(async () => {
  await server.shutdown(100);
  rmSync(directory, { recursive: true, force: true });
});

describe("mutual TLS", () => {
  it("lets in who shares the authority", async () => {
    const client = createClient(Cachestore, `localhost:${server.port}`, { tls: ours });
    expect((await client.lookup({}, { deadline: 5_000 })).held).toBe(7);
    client.close();
  });

  it.each([
    ["a client of another authority", () => ({ ...strangers, authority: ours.authority })],
    ["a server of another authority", () => ({ ...ours, authority: strangers.authority })],
    ["a client in the clear", () => undefined],
  ])("refuses %s", async (_, files) => {
    const tls = files();
    const client = createClient(Cachestore, `localhost:${server.port}`, tls === undefined ? {} : { tls });
    await expect(client.lookup({}, { deadline: 3_000 })).rejects.toMatchObject({
      code: /^(UNAVAILABLE|DEADLINE_EXCEEDED)$/,
    });
    client.close();
  });
});

/** An authority and a certificate of it for localhost, good for a day. */
function certificates(name: string): TlsFiles {
  const path = (file: string) => join(directory, `${name}-${file}`);
  const openssl = (...words: string[]) => execFileSync("openssl", words, { stdio: "pipe" });
  const newKey = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"];
  const authority = ["-keyout", path("ca.key"), "-out", path("ca.pem"), "-subj", `/CN=${name} authority`];
  openssl("req", "-x509", ...newKey, ...authority);
  openssl("req", ...newKey.slice(0, 5), "-keyout", path("key"), "-out", path("csr"), "-subj", "/CN=localhost");
  writeFileSync(path("ext"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n");
  const signer = ["-CA", path("ca.pem"), "-CAkey", path("ca.key"), "-CAcreateserial", "-extfile", path("ext")];
  openssl("x509", "-req", "-days", "1", "-in", path("csr"), "-out", path("pem"), ...signer);
  return {
    certificate: readFileSync(path("pem")),
    key: readFileSync(path("key")),
    authority: readFileSync(path("ca.pem")),
  };
}
