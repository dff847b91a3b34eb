/** What the attention kernels are generated from: lanes, shapes, and small helpers for generated text. */
import type { ActivationOutput } from "./half-output.wgsl.ts";
import type { KvFormat, KvShape } from "./kv-format.ts";

/** Sealed tokens of one decode split: fixed positions of the sequence. */
export const SPLIT_TOKENS = 256;

/** Workgroup of one vector, and whether lanes talk through subgroup operations or through workgroup memory. */
export interface LanePlan {
  readonly lanes: number;
  readonly subgroups: boolean;
}

/** Everything static about one model's attention kernels. */
export interface AttentionTemplate {
  readonly format: KvFormat;
  readonly shape: KvShape;
  readonly heads: number;
  readonly maxPages: number;
  /** Splits of one row's partials buffer. */
  readonly maxSplits: number;
  readonly lanePlan: LanePlan;
  /** Query heads of one KV head taken by a workgroup: divides heads / kvHeads. */
  readonly queryHeads: number;
  /** Query rows of a prefill tile. */
  readonly tileRows: number;
  /** Factor of the logits. */
  readonly scale: number;
  readonly output: ActivationOutput;
}

/** The entry points. */
export type AttentionKind = "prefill" | "split" | "merge";

/** Stands for minus infinity, which WGSL may assume away. */
export const SENTINEL = "-1.0e30";

export const range = (count: number) => Array.from({ length: count }, (_, i) => i);

/** `count` pieces of text, one an index, joined. */
export const each = (count: number, text: (i: number) => string, separator = "\n") =>
  range(count).map(text).join(separator);

/** Sizes that the generators share. */
export interface Shapes {
  readonly template: AttentionTemplate;
  readonly kind: AttentionKind;
  readonly d: number;
  readonly lanes: number;
  /** Vectors of tokens in a group of 32. */
  readonly tokenVectors: number;
  /** Vectors of channels in a head. */
  readonly channelVectors: number;
  /** Queries of a workgroup. */
  readonly queries: number;
  readonly parts: number;
}

/** Sizes of one entry point. */
export function shapesOf(template: AttentionTemplate, kind: AttentionKind): Shapes {
  const { lanes } = template.lanePlan;
  const d = template.shape.headDim;
  const rows = kind === "prefill" ? template.tileRows : 1;
  return {
    template,
    kind,
    d,
    lanes,
    tokenVectors: 32 / lanes,
    channelVectors: d / lanes,
    queries: rows * template.queryHeads,
    parts: template.format.valueBits === 16 ? 0 : d / 32,
  };
}
