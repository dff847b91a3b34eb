/**
 * Random weights at memory speed: a pool of random blocks is made once for a type and scale, and a tensor is a sequence
 * of runs copied from it at places that its name decides.
 */
import { createHash } from "node:crypto";
import { floatToHalf, type GgmlType, ggmlBlock, ggmlByteLength } from "@kivimesh/kernels";

/** Elements of a pool; a multiple of every block size. */
const POOL_ELEMENTS = 1 << 20;
/** Elements copied from one place of the pool. */
const RUN_ELEMENTS = 1 << 14;

/** xorshift128, seeded from a name. */
function randomWords(name: string): () => number {
  const seed = createHash("sha256").update(name).digest();
  const state = new Uint32Array([1, 2, 3, 4].map((_, i) => seed.readUInt32LE(i * 4) | 1));
  return () => {
    let t = state[3] as number;
    const s = state[0] as number;
    state.copyWithin(1, 0, 3);
    t ^= t << 11;
    t ^= t >>> 8;
    state[0] = t ^ s ^ (s >>> 19);
    return state[0];
  };
}

/** Uniform with the asked standard deviation: sqrt(3) * deviation to each side. */
function uniform(next: () => number, deviation: number): number {
  return (next() / 2 ** 31 - 1) * Math.sqrt(3) * deviation;
}

type BlockWriter = (view: DataView, offset: number, next: () => number, deviation: number) => void;

function writeCodes(view: DataView, offset: number, bytes: number, next: () => number): void {
  for (let at = 0; at < bytes; at += 4) view.setUint32(offset + at, next(), true);
}

/** One block of each type that dummy models use. */
const WRITERS: ReadonlyMap<GgmlType, BlockWriter> = new Map<GgmlType, BlockWriter>([
  ["F32", (view, offset, next, deviation) => view.setFloat32(offset, uniform(next, deviation), true)],
  ["F16", (view, offset, next, deviation) => view.setUint16(offset, floatToHalf(uniform(next, deviation)), true)],
  [
    "Q8_0",
    (view, offset, next, deviation) => {
      // Codes -128 … 127, uniform: their standard deviation is 256 / sqrt(12).
      view.setUint16(offset, floatToHalf((deviation * Math.sqrt(12)) / 256), true);
      writeCodes(view, offset + 2, 32, next);
    },
  ],
  [
    "Q4_1",
    (view, offset, next, deviation) => {
      const scale = (deviation * Math.sqrt(12)) / 16;
      view.setUint16(offset, floatToHalf(scale), true);
      view.setUint16(offset + 2, floatToHalf(-7.5 * scale), true);
      writeCodes(view, offset + 4, 16, next);
    },
  ],
]);

// A model has few (type, deviation) pairs: one per distinct number of inputs.
const MAX_POOLS = 8;
const pools = new Map<string, Uint8Array>();

function pool(type: GgmlType, deviation: number): Uint8Array {
  const key = `${type}/${deviation}`;
  const known = pools.get(key);
  if (known !== undefined) return known;
  const write = WRITERS.get(type);
  if (write === undefined) throw new RangeError(`no dummy weights of type ${type}: ${[...WRITERS.keys()].join(", ")}`);
  const block = ggmlBlock(type);
  const made = new Uint8Array(ggmlByteLength(type, POOL_ELEMENTS));
  const view = new DataView(made.buffer);
  const next = randomWords(key);
  for (let offset = 0; offset < made.length; offset += block.bytes) write(view, offset, next, deviation);
  if (pools.size >= MAX_POOLS) pools.clear();
  pools.set(key, made);
  return made;
}

/**
 * @param elements a multiple of the type's block. @param deviation standard deviation of the values.
 * @param name decides the content; the same name gives the same bytes.
 */
export function dummyBytes(type: GgmlType, elements: number, deviation: number, name: string): Uint8Array {
  const source = pool(type, deviation);
  const next = randomWords(name);
  const bytes = new Uint8Array(ggmlByteLength(type, elements));
  const run = ggmlByteLength(type, RUN_ELEMENTS);
  const starts = (POOL_ELEMENTS - RUN_ELEMENTS) / ggmlBlock(type).elements;
  for (let at = 0; at < bytes.length; at += run) {
    const start = (next() % starts) * ggmlBlock(type).bytes;
    bytes.set(source.subarray(start, start + Math.min(run, bytes.length - at)), at);
  }
  return bytes;
}
