import { describe, expect, test } from "vitest";
import { KV_FORMAT_NAMES, KV_LAYOUT_VERSION, kvFormat, validateKv } from "./kv-format.ts";
import {
  bitsPerElement,
  blockBytes,
  codesPerWord,
  keyMetaOffset,
  keyWordOffset,
  kvPageLayout,
  pageBytes,
  valueMetaOffset,
  valueWordOffset,
} from "./kv-layout.ts";

const SMOLLM = { layers: 30, kvHeads: 3, headDim: 64, blockTokens: 128, residualTokens: 128 };

describe("KV formats", () => {
  test("have distinct ids that carry the layout version", () => {
    const ids = KV_FORMAT_NAMES.map((name) => kvFormat(name).id);
    expect(new Set(ids).size).toBe(ids.length);
    for (const id of ids) expect(id >>> 24).toBe(KV_LAYOUT_VERSION);
  });

  test("ids and sizes are pinned: blocks on disk depend on them", () => {
    const pinned = KV_FORMAT_NAMES.map((name) => [
      name,
      kvFormat(name).id.toString(16),
      pageBytes(kvFormat(name), SMOLLM),
    ]);
    expect(pinned).toEqual([
      ["f16", "1101000", 98304],
      ["kivi4", "1040400", 30720],
      ["kivi2", "1020200", 18432],
      ["kivi4r", "1040401", 30976],
      ["kivi2r", "1020201", 18688],
      ["kivi-k4v2", "1040200", 24576],
      ["kivi-k4v2r", "1040201", 24832],
      ["kivi-k2v4", "1020400", 24576],
    ]);
    expect(blockBytes(kvFormat("kivi2r"), SMOLLM)).toBe(18688 * 30);
  });

  test("bits an element, metadata included", () => {
    expect(bitsPerElement(kvFormat("f16"), SMOLLM)).toBe(16);
    expect(bitsPerElement(kvFormat("kivi2"), SMOLLM)).toBe(3);
    expect(bitsPerElement(kvFormat("kivi4"), SMOLLM)).toBe(5);
    expect(bitsPerElement(kvFormat("kivi2r"), SMOLLM)).toBeCloseTo(3.0417, 4);
  });

  test("an unknown name lists the known ones", () => {
    expect(() => kvFormat("kivi3")).toThrow(/kivi3.*kivi2r/);
  });

  test.each([
    ["kivi2", { headDim: 80 }, /headDim 80 is not a multiple of 32/],
    ["kivi2r", { headDim: 96 }, /power of two/],
    ["kivi2", { blockTokens: 48 }, /blockTokens 48/],
    ["kivi2", { residualTokens: 64 }, /residualTokens 64/],
    ["f16", { headDim: 12 }, /multiple of 8/],
    ["f16", { headDim: 512 }, /over 256/],
    ["f16", { kvHeads: 0 }, /kvHeads is 0/],
  ])("%s refuses %o", (name, change, message) => {
    expect(() => validateKv(kvFormat(name), { ...SMOLLM, ...change })).toThrow(message);
  });
});

describe.each(KV_FORMAT_NAMES)("layout of %s", (name) => {
  test.each([32, 64, 96, 128])("every word of a head is used once, headDim %i", (headDim) => {
    const format = kvFormat(name);
    if (format.rotated && headDim === 96) return;
    const shape = { layers: 1, kvHeads: 2, headDim, blockTokens: 64, residualTokens: 64 };
    const layout = kvPageLayout(format, shape);
    const seen = new Uint8Array(layout.head);
    for (let token = 0; token < shape.blockTokens; token++) {
      for (let word = 0; word < headDim / codesPerWord(format.keyBits); word++) {
        const at = layout.keyCodes + keyWordOffset(headDim, format.keyBits, token, word);
        seen[at] = (seen[at] as number) + 1;
      }
      for (let word = 0; word < headDim / codesPerWord(format.valueBits); word++) {
        const at = layout.valueCodes + valueWordOffset(headDim, format.valueBits, token, word);
        seen[at] = (seen[at] as number) + 1;
      }
      for (let part = 0; format.valueBits < 16 && part < headDim / 32; part++) {
        const at = layout.valueMeta + valueMetaOffset(headDim, token, part);
        seen[at] = (seen[at] as number) + 1;
      }
      for (let channel = 0; format.keyBits < 16 && token % 32 === 0 && channel < headDim; channel++) {
        const at = layout.keyMeta + keyMetaOffset(headDim, format.keyBits, token, channel);
        seen[at] = (seen[at] as number) + 1;
      }
    }
    expect(seen.every((count) => count === 1)).toBe(true);
    expect(layout.norms).toBe(2 * layout.head);
    expect(pageBytes(format, shape) % 16).toBe(0);
  });
});
