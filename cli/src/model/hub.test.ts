/** Pulling from a hub: a small one on loopback that speaks the same API. */
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cachedModel, cachedModels, modelFolder } from "./model-cache.ts";
import { resolveModel } from "./model-source.ts";
import { pullModel } from "./pull.ts";

const COMMIT = "0123456789abcdef0123456789abcdef01234567";
const GGUF = Buffer.alloc(300_000, "weights of a model ");
const CONFIG = Buffer.from('{"architectures":["LlamaForCausalLM"]}');

function entry(path: string, content: Buffer, large: boolean) {
  const oid = createHash("sha1").update(`blob ${content.length}\0`).update(content).digest("hex");
  const lfs = { oid: createHash("sha256").update(content).digest("hex"), size: content.length, pointerSize: 134 };
  return { type: "file", path, size: content.length, oid, ...(large ? { lfs } : {}) };
}

/** What the hub holds, what it was asked, and how it misbehaves. */
class LocalHub {
  files = new Map<string, { content: Buffer; large: boolean }>();
  requests: IncomingMessage[] = [];
  token: string | undefined;
  /** Cuts the connection after so many bytes of a file. */
  cutAfter = Number.POSITIVE_INFINITY;
  /** Serves other bytes than it announces. */
  corrupt = false;
  ignoreRange = false;
  private readonly server: Server = createServer((request, response) => this.answer(request, response));

  async start(): Promise<string> {
    await new Promise<void>((resolve) => this.server.listen(0, "127.0.0.1", resolve));
    return `http://127.0.0.1:${(this.server.address() as AddressInfo).port}`;
  }

  async stop(): Promise<void> {
    this.server.closeAllConnections();
    await new Promise((resolve) => this.server.close(resolve));
  }

  private answer(request: IncomingMessage, response: ServerResponse): void {
    this.requests.push(request);
    const { pathname } = new URL(request.url ?? "/", "http://hub");
    const json = (status: number, value: unknown) =>
      response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(value));
    if (this.token !== undefined && request.headers.authorization !== `Bearer ${this.token}`) {
      json(401, { error: "unauthorized" });
    } else if (pathname === "/api/models/acme/tiny/revision/main") {
      json(200, {
        _id: "1",
        id: "acme/tiny",
        sha: COMMIT,
        private: false,
        downloads: 0,
        likes: 0,
        lastModified: "2026-01-01T00:00:00Z",
      });
    } else if (pathname === `/api/models/acme/tiny/tree/${COMMIT}`) {
      json(
        200,
        [...this.files].map(([path, { content, large }]) => entry(path, content, large)),
      );
    } else if (pathname.startsWith(`/acme/tiny/resolve/${COMMIT}/`)) {
      this.sendFile(decodeURIComponent(pathname.split(`${COMMIT}/`)[1] ?? ""), request, response);
    } else json(404, { error: "not found" });
  }

  private sendFile(path: string, request: IncomingMessage, response: ServerResponse): void {
    const content = Buffer.from(this.files.get(path)?.content ?? "");
    if (this.corrupt) content[content.length - 1] = 0;
    const from = this.ignoreRange ? 0 : Number(/bytes=(\d+)-/.exec(request.headers.range ?? "")?.[1] ?? 0);
    response.writeHead(from > 0 ? 206 : 200, { "content-length": content.length - from });
    if (content.length - from > this.cutAfter) {
      response.write(content.subarray(from, from + this.cutAfter), () => setTimeout(() => response.destroy(), 50));
    } else response.end(content.subarray(from));
  }

  downloads(): IncomingMessage[] {
    return this.requests.filter((request) => request.url?.includes("/resolve/"));
  }
}

describe("pulling from a hub", () => {
  let hub: LocalHub;
  let cache: string;
  const saved = { ...process.env };

  beforeEach(async () => {
    hub = new LocalHub();
    cache = await mkdtemp(join(tmpdir(), "kivimesh-hub-"));
    process.env.HF_ENDPOINT = await hub.start();
    process.env.KIVIMESH_CACHE = cache;
    delete process.env.HF_TOKEN;
    hub.files.set("tiny.Q8_0.gguf", { content: GGUF, large: true });
    hub.files.set("README.md", { content: Buffer.from("# tiny"), large: false });
  });

  afterEach(async () => {
    process.env = { ...saved };
    await hub.stop();
    await rm(cache, { recursive: true, force: true });
  });

  it("takes the only GGUF file, verified, and is offline afterwards", async () => {
    const { model, fetched } = await pullModel("hf:acme/tiny");
    expect(fetched).toBe(true);
    expect(await readFile(model.path)).toEqual(GGUF);
    expect(model.manifest).toMatchObject({ name: "hf:acme/tiny", revision: COMMIT, entry: "tiny.Q8_0.gguf" });
    await hub.stop();
    expect((await pullModel("hf:acme/tiny")).fetched).toBe(false);
    expect(await resolveModel("hf:acme/tiny")).toEqual({ path: model.path, name: "hf:acme/tiny" });
    expect((await cachedModels()).map((cached) => cached.manifest.name)).toEqual(["hf:acme/tiny"]);
  });

  it("takes a folder of safetensors with its companions and nothing else", async () => {
    hub.files.clear();
    for (const path of ["config.json", "tokenizer.json", "training.log"])
      hub.files.set(path, { content: CONFIG, large: false });
    hub.files.set("model.safetensors", { content: GGUF, large: true });
    const { model } = await pullModel("hf:acme/tiny");
    expect(model.path).toBe(modelFolder("hf:acme/tiny"));
    expect((await readdir(model.path)).sort()).toEqual([
      "config.json",
      "kivimesh-model.json",
      "model.safetensors",
      "tokenizer.json",
    ]);
    expect(await readFile(join(model.path, "config.json"))).toEqual(CONFIG);
  });

  it("goes on with an interrupted download", async () => {
    hub.cutAfter = 100_000;
    await expect(pullModel("hf:acme/tiny")).rejects.toThrow();
    expect(await cachedModel("hf:acme/tiny")).toBeUndefined();
    hub.cutAfter = Number.POSITIVE_INFINITY;
    const { model } = await pullModel("hf:acme/tiny");
    expect(await readFile(model.path)).toEqual(GGUF);
    expect(hub.downloads().map((request) => request.headers.range)).toEqual([undefined, "bytes=100000-"]);
  });

  it("starts anew where the server ignores the range", async () => {
    hub.cutAfter = 100_000;
    await expect(pullModel("hf:acme/tiny")).rejects.toThrow();
    Object.assign(hub, { cutAfter: Number.POSITIVE_INFINITY, ignoreRange: true });
    expect(await readFile((await pullModel("hf:acme/tiny")).model.path)).toEqual(GGUF);
  });

  it.each([true, false])("refuses and removes a file with another digest (large-file storage: %s)", async (large) => {
    hub.files.set("tiny.Q8_0.gguf", { content: GGUF, large });
    hub.corrupt = true;
    await expect(pullModel("hf:acme/tiny")).rejects.toMatchObject({
      code: "MODEL_FILE_INVALID",
      message: expect.stringContaining("digest"),
    });
    expect(await readdir(modelFolder("hf:acme/tiny"))).toEqual([]);
    hub.corrupt = false;
    expect((await pullModel("hf:acme/tiny")).fetched).toBe(true);
  });

  it("sends the token and says when one is needed", async () => {
    hub.token = "hf_secret";
    await expect(pullModel("hf:acme/tiny")).rejects.toThrow(/401 for acme\/tiny; set HF_TOKEN/);
    process.env.HF_TOKEN = "hf_secret";
    expect((await pullModel("hf:acme/tiny")).fetched).toBe(true);
  });

  it("names the choices where it has to choose", async () => {
    hub.files.set("tiny.Q4_0.gguf", { content: GGUF, large: true });
    await expect(pullModel("hf:acme/tiny")).rejects.toThrow(
      "name one: hf:acme/tiny/tiny.Q8_0.gguf, hf:acme/tiny/tiny.Q4_0.gguf",
    );
    await expect(pullModel("hf:acme/tiny/other.gguf")).rejects.toThrow("has no file other.gguf; it has hf:acme/tiny/");
    const { model } = await pullModel("hf:acme/tiny/tiny.Q4_0.gguf");
    expect(existsSync(model.path)).toBe(true);
  });

  it("refuses malformed and unknown names", async () => {
    await expect(pullModel("hf:acme")).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
    await expect(pullModel("hf:acme/../etc")).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
    await expect(pullModel("gpt-9")).rejects.toThrow(/expected smollm2-135m-instruct, or hf:/);
    await expect(pullModel("hf:acme/nothing")).rejects.toThrow(/answered 404 for acme\/nothing/);
    await expect(resolveModel("smollm2-135m-instruct")).rejects.toThrow("run: npx kivimesh pull smollm2-135m-instruct");
  });
});
