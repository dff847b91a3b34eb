import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { dequantizeGgml, GGML_TYPES, type GgmlType, ggmlByteLength } from "./ggml-quants.ts";
import { assertClose } from "./testing/comparison.ts";

/** Blocks that the Python package `gguf` decoded; see golden/make-ggml-blocks.py. */
const golden = JSON.parse(readFileSync(new URL("golden/ggml-blocks.json", import.meta.url), "utf8")) as Partial<
  Record<GgmlType, { bytes: string; values: string }>
>;

test.each(GGML_TYPES.filter((type) => type !== "F32" && type !== "BF16"))("%s decodes as ggml does", (type) => {
  const entry = golden[type];
  if (entry === undefined) throw new Error(`no golden blocks of ${type}`);
  const bytes = new Uint8Array(Buffer.from(entry.bytes, "base64"));
  const expected = new Float32Array(new Uint8Array(Buffer.from(entry.values, "base64")).buffer);
  assertClose(type, dequantizeGgml(type, bytes, expected.length), expected, { nmse: 1e-14, maxAbs: 2e-3 });
});

test("F32 and BF16 are read as they are", () => {
  const values = Float32Array.from([1, -2.5, 7.125, 1e-30]);
  expect(dequantizeGgml("F32", new Uint8Array(values.buffer), 4)).toEqual(values);
  const upper = Uint16Array.from([0x3f80, 0xc020, 0x0000, 0x7f80]);
  expect([...dequantizeGgml("BF16", new Uint8Array(upper.buffer), 4)]).toEqual([1, -2.5, 0, Number.POSITIVE_INFINITY]);
});

test("lengths are checked", () => {
  expect(ggmlByteLength("Q4_1", 64)).toBe(40);
  expect(() => ggmlByteLength("Q4_K", 128)).toThrow(/128 elements, must be a multiple of 256/);
  expect(() => dequantizeGgml("Q8_0", new Uint8Array(33), 32)).toThrow(/33 bytes for 32 elements, expected 34/);
});
