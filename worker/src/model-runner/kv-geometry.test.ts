import { expect, test } from "vitest";
import { dummyModel } from "../model/dummy-model.ts";
import { kvGeometry, pagesInPool } from "./kv-geometry.ts";

const { config } = dummyModel("smollm2-135m");
const kv = kvGeometry(config, "f16", 128, 128);
const wide = { maxStorageBufferBindingSize: 2 ** 31, maxBufferSize: 2 ** 32 };
const all = { maxSequences: 4, maxPagesPerSequence: 16 };

test("a block of f16 is what its tokens take", () => {
  expect(kv.f16BytesPerToken).toBe(30 * 2 * 3 * 64 * 2);
  expect(kv.blockBytes).toBe(128 * kv.f16BytesPerToken);
  expect(kv.bitsPerElement).toBe(16);
  expect(kvGeometry(config, "kivi2", 128, 128).blockBytes).toBe((kv.blockBytes * 3) / 16);
});

test("the pool holds every slot's full context, or what the bytes allow", () => {
  expect(pagesInPool(wide, kv, all)).toBe(64);
  expect(pagesInPool(wide, kv, { ...all, kvBytes: 10.9 * kv.blockBytes })).toBe(10);
  // By default at most 512 MiB.
  expect(pagesInPool(wide, kv, { maxSequences: 64, maxPagesPerSequence: 64 })).toBe(
    Math.floor((512 << 20) / kv.blockBytes),
  );
});

test("a layer's pages stay within one binding", () => {
  const layerBytes = kv.blockBytes / 30;
  const narrow = { ...wide, maxStorageBufferBindingSize: 7 * layerBytes + 100 };
  expect(pagesInPool(narrow, kv, { ...all, kvBytes: 64 * kv.blockBytes })).toBe(7);
});

test("less than a residual window of blocks is refused", () => {
  const wideWindow = kvGeometry(config, "kivi2r", 32, 128);
  expect(() => pagesInPool(wide, wideWindow, { ...all, kvBytes: 3.5 * wideWindow.blockBytes })).toThrow(
    /holds 3 KV blocks of \d+ bytes; at least 4 are needed/,
  );
});

test("formats that cannot hold the heads are refused", () => {
  expect(() => kvGeometry({ ...config, headDim: 80 }, "kivi2r", 128, 128)).toThrow(/KV format kivi2r: headDim 80/);
});
