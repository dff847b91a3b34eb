import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { blockIds, chainRoot, hex, tenantNamespace } from "./prefix-hash.ts";

const modelDigest = Uint8Array.from({ length: 32 }, (_, index) => index);
const namespace = tenantNamespace("kivimesh-local", "default");
const parts = { modelDigest, formatId: 7, blockTokens: 4, residualTokens: 8, tenantNamespace: namespace };

// Vectors from golden/prefix_hash.py, which shares no code with this package.
describe("vectors", () => {
  it("tenant namespaces", () => {
    expect(hex(namespace)).toBe("ca80ca87b55871e58e9dcc7df379b4401aaef763a08424aea4f555e57d64da5a");
    expect(hex(tenantNamespace("kivimesh-local", "default", "salt"))).toBe(
      "ea15c1d8ac6fc53a34d733219fb7fe86fc58543cf0aa38bbe0429b012d5d749b",
    );
  });

  it("chain roots", () => {
    const large = { ...parts, formatId: 0x00020203, blockTokens: 128, residualTokens: 128 };
    expect(hex(chainRoot(large))).toBe("470a1c9748220cc0afd2472c0d4d818ef471eda6cfbbd76ebce5219349f291ed");
    expect(hex(chainRoot(parts))).toBe("a4ac53bc4d3ae7140a55dc487212135c7f440f3dbbe3f95c8da9314a95eab125");
  });

  it("block ids, without the partial last block", () => {
    const ids = blockIds(chainRoot(parts), [0, 1, 2, 3, 4, 5, 6, 7, 8, 0xffff_ffff], 4);
    expect(ids.map(hex)).toEqual([
      "afce9b730d92b2aef483fc474e300257ba798e33bb121827482c55b75a42186c",
      "8bde78e632b4938450bd7824c4caf546798dc1ee9f53f11dc84756c6ee999aa0",
    ]);
    expect(hex(blockIds(chainRoot(parts), [0xffff_ffff, 70_000], 2)[0]!)).toBe(
      "0042a49c0ba0e131163cfd34bfbd9b0ac715577a593d4ea7104e743314118bfa",
    );
  });
});

describe("separation", () => {
  it("gives every differing part another root", () => {
    const other = [
      { ...parts, modelDigest: new Uint8Array(32) },
      { ...parts, formatId: 8 },
      { ...parts, blockTokens: 8 },
      { ...parts, residualTokens: 4 },
      { ...parts, tenantNamespace: tenantNamespace("kivimesh-local", "other") },
      { ...parts, tenantNamespace: tenantNamespace("kivimesh-local", "default", "salt") },
      { ...parts, tenantNamespace: tenantNamespace("another-secret", "default") },
    ];
    expect(new Set([parts, ...other].map((each) => hex(chainRoot(each)))).size).toBe(other.length + 1);
  });

  it("cannot reach another tenant through a salt", () => {
    expect(() => tenantNamespace("s", "a\0b")).toThrow(/NUL/);
    expect(hex(tenantNamespace("s", "a", "b"))).not.toBe(hex(tenantNamespace("s", "ab")));
  });

  it("covers all tokens before a block, and only them", () => {
    const tokens = fc.uint32Array({ minLength: 16, maxLength: 64 });
    fc.assert(
      fc.property(tokens, fc.nat(), fc.integer({ min: 1, max: 8 }), (before, pick, blockTokens) => {
        const index = pick % before.length;
        const after = before.slice();
        after[index] = (before[index]! + 1) >>> 0;
        const root = chainRoot(parts);
        const left = blockIds(root, before, blockTokens);
        const right = blockIds(root, after, blockTokens);
        expect(left.length).toBe(Math.floor(before.length / blockTokens));
        const changed = Math.floor(index / blockTokens);
        left.forEach((id, block) => {
          expect(hex(id) === hex(right[block]!)).toBe(block < changed);
        });
      }),
    );
  });

  it("extends a chain without changing its start", () => {
    const tokens = Uint32Array.from({ length: 40 }, (_, index) => index * 3);
    const root = chainRoot(parts);
    const whole = blockIds(root, tokens, 8);
    expect(blockIds(root, tokens.subarray(0, 24), 8).map(hex)).toEqual(whole.slice(0, 3).map(hex));
    expect(blockIds(whole[2]!, tokens.subarray(24), 8).map(hex)).toEqual(whole.slice(3).map(hex));
  });
});

describe("bad input", () => {
  it("is named", () => {
    expect(() => chainRoot({ ...parts, modelDigest: new Uint8Array(31) })).toThrow(/modelDigest has 31 bytes/);
    expect(() => chainRoot({ ...parts, blockTokens: 0 })).toThrow(/blockTokens must be at least 1/);
    expect(() => blockIds(chainRoot(parts), [1, 2, -1, 4], 4)).toThrow(/token -1/);
    expect(() => blockIds(chainRoot(parts), [1, 2, 2 ** 32, 4], 4)).toThrow(/unsigned 32-bit/);
    expect(() => blockIds(new Uint8Array(3), [1], 1)).toThrow(/root has 3 bytes/);
    expect(() => tenantNamespace("s", "t", "x".repeat(65))).toThrow(/64 bytes/);
  });
});
