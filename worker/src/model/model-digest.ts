/** SHA-256 of model files, read as a stream so that the event loop stays free. */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { basename } from "node:path";

const READ_BYTES = 4 << 20;

/** SHA-256 of one file: 32 bytes. */
export async function fileDigest(path: string): Promise<Uint8Array> {
  const hash = createHash("sha256");
  for await (const chunk of createReadStream(path, { highWaterMark: READ_BYTES })) hash.update(chunk as Uint8Array);
  return new Uint8Array(hash.digest());
}

/** SHA-256 over the names and digests of several files, in the given order. */
export async function filesDigest(paths: readonly string[]): Promise<Uint8Array> {
  const hash = createHash("sha256");
  for (const path of paths) {
    hash.update(`${basename(path)}\n`);
    hash.update(await fileDigest(path));
  }
  return new Uint8Array(hash.digest());
}
