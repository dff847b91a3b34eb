/** Downloads one file over HTTP: resumable, verified against the digest that the hub names, visible only when whole. */
import { createHash, type Hash } from "node:crypto";
import { createReadStream, createWriteStream, existsSync } from "node:fs";
import { mkdir, rename, rm, stat } from "node:fs/promises";
import { dirname } from "node:path";
import { Readable, Transform } from "node:stream";
import { pipeline } from "node:stream/promises";
import type { ReadableStream } from "node:stream/web";
import { ClusterError } from "@kivimesh/proto";

/** A file's identity at the hub: SHA-256 where it is in large-file storage, else its git blob id (SHA-1). */
export interface FileDigest {
  readonly algorithm: "sha256" | "git";
  /** Hex. */
  readonly value: string;
}

export interface DownloadRequest {
  readonly url: string;
  readonly headers: Readonly<Record<string, string>>;
  readonly bytes: number;
  readonly digest: FileDigest;
  /** Where the whole file will be. */
  readonly target: string;
  /** Called with the bytes that are there. */
  readonly onProgress: (bytes: number) => void;
  readonly signal?: AbortSignal;
}

const HTTP_PARTIAL_CONTENT = 206;
const HTTP_RANGE_NOT_SATISFIABLE = 416;

function startHash(digest: FileDigest, bytes: number): Hash {
  return digest.algorithm === "sha256" ? createHash("sha256") : createHash("sha1").update(`blob ${bytes}\0`);
}

async function digestOf(path: string, digest: FileDigest, bytes: number): Promise<string> {
  const hash = startHash(digest, bytes);
  await pipeline(createReadStream(path), hash);
  return hash.digest("hex");
}

async function sizeOf(path: string): Promise<number> {
  return (await stat(path).catch(() => undefined))?.size ?? 0;
}

/** Appends to the partial file what it lacks. A server that ignores the range starts it anew. */
async function fetchRest(request: DownloadRequest, partial: string): Promise<void> {
  let have = await sizeOf(partial);
  if (have > request.bytes) {
    await rm(partial);
    have = 0;
  }
  if (have === request.bytes) return;
  const response = await fetch(request.url, {
    headers: { ...request.headers, ...(have > 0 ? { Range: `bytes=${have}-` } : {}) },
    ...(request.signal === undefined ? {} : { signal: request.signal }),
  });
  if (response.status === HTTP_RANGE_NOT_SATISFIABLE) await rm(partial, { force: true });
  if (!response.ok || response.body === null) {
    throw new ClusterError("MODEL_NOT_FOUND", `${request.url} answered ${response.status} ${response.statusText}`);
  }
  const appends = response.status === HTTP_PARTIAL_CONTENT;
  let done = appends ? have : 0;
  const count = new Transform({
    transform(chunk: Buffer, _encoding, next) {
      done += chunk.length;
      request.onProgress(done);
      next(null, chunk);
    },
  });
  const body = Readable.fromWeb(response.body as ReadableStream<Uint8Array>);
  await pipeline(body, count, createWriteStream(partial, { flags: appends ? "a" : "w", flush: true }));
}

/** Whether the file is in place already, from a pull of another file or revision. */
async function isThere({ target, bytes, digest }: DownloadRequest): Promise<boolean> {
  if (!existsSync(target) || (await sizeOf(target)) !== bytes) return false;
  return (await digestOf(target, digest, bytes)) === digest.value;
}

/**
 * Downloads the file, or the rest of it, and moves it into place once its digest is right. An interrupted download is
 * gone on with by the next call.
 * @throws ClusterError MODEL_FILE_INVALID where size or digest differ (the wrong file is removed).
 */
export async function downloadVerified(request: DownloadRequest): Promise<void> {
  // The digest is part of the name: what is left of another version of the file is never gone on with.
  const partial = `${request.target}.${request.digest.value.slice(0, 16)}.partial`;
  await mkdir(dirname(request.target), { recursive: true });
  if (await isThere(request)) return;
  await fetchRest(request, partial);
  const bytes = await sizeOf(partial);
  if (bytes < request.bytes) {
    throw new ClusterError(
      "MODEL_FILE_INVALID",
      `the download of ${request.target} ended after ${bytes} of ${request.bytes} bytes; run the same command again to go on`,
    );
  }
  const found = await digestOf(partial, request.digest, request.bytes);
  if (bytes !== request.bytes || found !== request.digest.value) {
    await rm(partial);
    throw new ClusterError(
      "MODEL_FILE_INVALID",
      `${request.target}: ${request.digest.algorithm} digest ${found} of ${bytes} bytes, but the hub says ${request.digest.value} of ${request.bytes}; the file was removed`,
    );
  }
  await rename(partial, request.target);
}
