/** Pulling from a hub: a small one on loopback that speaks the same API. */
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cachedModel, cachedModels, modelFolder } from "./model-cache.ts";
import { resolveModel } from "./model-source.ts";
import { pullModel } from "./pull.ts";

const COMMIT = "0123456789abcdef0123456789abcdef01234567";
const NEXT_COMMIT = "1123456789abcdef0123456789abcdef01234567";
const GGUF = Buffer.alloc(300_000, "weights of a model ");
const CONFIG = Buffer.from('{"architectures":["LlamaForCausalLM"]}');

function entry(path: string, content: Buffer, large: boolean) {
  const oid = createHash("sha1").update(`blob ${content.length}\0`).update(content).digest("hex");
  const lfs = { oid: createHash("sha256").update(content).digest("hex"), size: content.length, pointerSize: 134 };
  return { type: "file", path, size: content.length, oid, ...(large ? { lfs } : {}) };
}

/** `/api/models/owner/name/rest` or `/owner/name/rest` of a repository that exists. */
function splitRepository(pathname: string): string[] {
  const match = /^(?:\/api\/models)?\/(acme\/tiny|acme--tiny\/b|acme\/tiny--b)\/(.+)$/.exec(pathname);
  return match?.slice(1) ?? [];
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
  /** Commits by branch. */
  revisions: Readonly<Record<string, string>> = { main: COMMIT, next: NEXT_COMMIT };
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
    const [repository = "", rest = ""] = splitRepository(pathname);
    const json = (status: number, value: unknown) =>
      response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(value));
    if (this.token !== undefined && request.headers.authorization !== `Bearer ${this.token}`) {
      json(401, { error: "unauthorized" });
    } else if (/^revision\//.test(rest) && this.commitOf(rest) !== undefined) {
      json(200, {
        _id: "1",
        id: repository,
        sha: this.commitOf(rest),
        private: false,
        downloads: 0,
        likes: 0,
        lastModified: "2026-01-01T00:00:00Z",
      });
    } else if (/^tree\//.test(rest)) {
      json(
        200,
        [...this.files].map(([path, { content, large }]) => entry(path, content, large)),
      );
    } else if (/^resolve\//.test(rest)) {
      this.sendFile(decodeURIComponent(rest.split("/").slice(2).join("/")), request, response);
    } else json(404, { error: "not found" });
  }

  /** Of `revision/<branch>`. */
  private commitOf(rest: string): string | undefined {
    return this.revisions[rest.split("/")[1] ?? ""];
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

  it("serves the revision that was asked for, and no other", async () => {
    await pullModel("hf:acme/tiny");
    const next = Buffer.from("weights of the next revision");
    hub.files.clear();
    hub.files.set("next.gguf", { content: next, large: true });
    expect((await pullModel("hf:acme/tiny")).fetched).toBe(false);
    expect((await pullModel("hf:acme/tiny", { revision: "main" })).fetched).toBe(false);
    expect((await pullModel("hf:acme/tiny", { revision: COMMIT })).fetched).toBe(false);
    const { model, fetched } = await pullModel("hf:acme/tiny", { revision: "next" });
    expect(fetched).toBe(true);
    expect(model.manifest).toMatchObject({ revision: NEXT_COMMIT, requested: "next", entry: "next.gguf" });
    expect(await readFile(model.path)).toEqual(next);
    expect((await readdir(modelFolder("hf:acme/tiny"))).sort()).toEqual(["kivimesh-model.json", "next.gguf"]);
    expect((await pullModel("hf:acme/tiny", { revision: "next" })).fetched).toBe(false);
    await expect(pullModel("hf:acme/tiny", { revision: "typo" })).rejects.toThrow(/404/);
    expect((await resolveModel("hf:acme/tiny")).path).toBe(model.path);
    await expect(pullModel("smollm2-135m-instruct", { revision: "next" })).rejects.toThrow(/no revisions/);
  });

  it("keeps files of the last revision that did not change", async () => {
    await pullModel("hf:acme/tiny");
    const before = hub.downloads().length;
    expect((await pullModel("hf:acme/tiny", { revision: "next" })).fetched).toBe(true);
    expect(hub.downloads()).toHaveLength(before);
  });

  it("keeps models apart whose names look alike", async () => {
    const [one, other] = ["hf:acme--tiny/b", "hf:acme/tiny--b"];
    expect(modelFolder(one)).not.toBe(modelFolder(other));
    await pullModel(one);
    expect(await cachedModel(other)).toBeUndefined();
    expect((await pullModel(other)).model.manifest.name).toBe(other);
    expect((await cachedModel(one))?.manifest.name).toBe(one);
  });

  it("does not serve a folder that holds another model", async () => {
    const { model } = await pullModel("hf:acme/tiny");
    const manifest = join(modelFolder("hf:acme/tiny"), "kivimesh-model.json");
    await writeFile(manifest, JSON.stringify({ ...model.manifest, name: "hf:someone/else" }));
    expect(await cachedModel("hf:acme/tiny")).toBeUndefined();
    await expect(resolveModel("hf:acme/tiny")).rejects.toMatchObject({ code: "MODEL_NOT_FOUND" });
  });

  it.each(["../../escaped.gguf", "/tmp/escaped.gguf", "a/../../../escaped.gguf", "..\\escaped.gguf", "a//b.gguf"])(
    "refuses a hub that lists the path %s",
    async (path) => {
      hub.files.clear();
      hub.files.set(path, { content: GGUF, large: true });
      await expect(pullModel("hf:acme/tiny")).rejects.toMatchObject({
        code: "MODEL_FILE_INVALID",
        message: expect.stringContaining("no path inside a folder"),
      });
      expect(hub.downloads()).toEqual([]);
    },
  );

  it("tells of a full disk as what it is", async () => {
    const folder = modelFolder("hf:acme/tiny");
    const digest = createHash("sha256").update(GGUF).digest("hex");
    await mkdir(folder, { recursive: true });
    await symlink("/dev/full", join(folder, `tiny.Q8_0.gguf.${digest.slice(0, 16)}.partial`));
    await expect(pullModel("hf:acme/tiny")).rejects.toMatchObject({
      name: "SetupError",
      message: expect.stringMatching(/cannot write .*tiny.Q8_0.gguf: ENOSPC.*free some space/),
    });
  });

  it("refuses malformed and unknown names", async () => {
    await expect(pullModel("hf:acme")).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
    await expect(pullModel("hf:acme/../etc")).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
    await expect(pullModel("gpt-9")).rejects.toThrow(/expected smollm2-135m-instruct, or hf:/);
    await expect(pullModel("hf:acme/nothing")).rejects.toThrow(/answered 404 for acme\/nothing/);
    await expect(resolveModel("smollm2-135m-instruct")).rejects.toThrow("run: npx kivimesh pull smollm2-135m-instruct");
  });
});
