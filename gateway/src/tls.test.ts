/** With certificates both listeners and the calls to workers are encrypted; gRPC asks for the client's too. */
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { request } from "node:https";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createClient, Inference, type TlsFiles } from "@kivimesh/proto";
import { expect, it } from "vitest";
import { startGateway } from "./gateway.ts";
import { TestCluster, until } from "./testing/cluster.ts";

/** A certificate for loopback, good for a day, that is its own authority. */
function selfSigned(): TlsFiles {
  const directory = mkdtempSync(join(tmpdir(), "kivimesh-tls-"));
  const [key, certificate] = [join(directory, "key.pem"), join(directory, "certificate.pem")];
  const curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"];
  const names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"];
  execFileSync("openssl", ["req", "-x509", ...curve, ...names, "-keyout", key, "-out", certificate], { stdio: "pipe" });
  const files = { key: readFileSync(key), certificate: readFileSync(certificate) };
  rmSync(directory, { recursive: true });
  return { ...files, authority: files.certificate };
}

function post(url: string, ca: Buffer, body: object): Promise<{ status: number | undefined; text: string }> {
  return new Promise((resolve, reject) => {
    const sent = request(url, { method: "POST", ca, headers: { "content-type": "application/json" } }, (response) => {
      let text = "";
      response.on("data", (part: Buffer) => {
        text += part.toString();
      });
      response.on("end", () => resolve({ status: response.statusCode, text }));
    });
    sent.on("error", reject);
    sent.end(JSON.stringify(body));
  });
}

it("serves HTTPS and gRPC with mutual TLS, and reaches its workers so", async () => {
  const tls = selfSigned();
  await using cluster = await TestCluster.start();
  await cluster.worker("a", { tls });
  const { jobQueues, membership } = cluster;
  const gateway = await startGateway({ tls, logLevel: "silent" }, { jobQueues, membership });
  cluster.gateways.push(gateway);
  expect(gateway.httpUrl).toMatch(/^https:/);
  await until("readiness", () => gateway.ready());
  const body = { model: "scripted", prompt: "once", max_tokens: 3 };
  const answer = await post(`${gateway.httpUrl}/v1/completions`, tls.authority, body);
  expect([answer.status, JSON.parse(answer.text).choices[0].text]).toEqual([200, "Hel"]);
  const client = createClient(Inference, gateway.grpcAddress, { tls });
  expect((await client.listModels({})).models).toHaveLength(1);
  client.close();
  const stranger = createClient(Inference, gateway.grpcAddress);
  await expect(stranger.listModels({}, { deadline: 2_000 })).rejects.toMatchObject({
    code: /^(UNAVAILABLE|DEADLINE_EXCEEDED)$/,
  });
  stranger.close();
});
