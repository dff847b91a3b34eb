import { ClusterError, maxCacheSaltBytes } from "@kivimesh/proto";
import { z } from "zod";
import type { Turn } from "./chat-template.ts";

/** What to continue. */
export type GenerationInput =
  | { readonly kind: "text"; readonly text: string }
  | { readonly kind: "chat"; readonly turns: readonly Turn[] }
  | { readonly kind: "tokens"; readonly ids: readonly number[] };

/** A request for text as both public APIs understand it, checked. */
export interface GenerationRequest {
  /** "": the only model served. */
  readonly model: string;
  readonly input: GenerationInput;
  /** Undefined: as many as the context and the gateway's limit allow. */
  readonly maxTokens: number | undefined;
  readonly temperature: number;
  readonly topP: number;
  /** 0: all. */
  readonly topK: number;
  /** Undefined: a random one. */
  readonly seed: bigint | undefined;
  readonly stop: readonly string[];
  readonly ignoreEos: boolean;
  readonly cacheSalt: string;
  readonly returnFirstLogits: boolean;
  /** "": any worker. */
  readonly workerId: string;
  /** The client's own id, for logs; "": none. */
  readonly clientRequestId: string;
}

const maxStopStrings = 4;
const maxStopCharacters = 256;
const maxUint32 = 0xffff_ffff;

const temperatureRange = "must be a number from 0 to 2";
const topPRange = "must be a number above 0 and at most 1";
const topKRange = "must be a whole number, 0 (all tokens) or more";
const maxTokensRange = "must be a whole number of at least 1";
const seedRange = "must be a whole number from -(2^53 - 1) to 2^53 - 1";
const stopRange = `must be a string or at most ${maxStopStrings} strings of 1 to ${maxStopCharacters} characters`;

const stopString = z.string(stopRange).min(1, stopRange).max(maxStopCharacters, stopRange);

/** The parameters that both APIs share, by their public names, each with the allowed range in its message. */
export const requestFields = {
  temperature: z.number(temperatureRange).min(0, temperatureRange).max(2, temperatureRange),
  top_p: z.number(topPRange).gt(0, topPRange).max(1, topPRange),
  top_k: z.number(topKRange).int(topKRange).min(0, topKRange).max(maxUint32, topKRange),
  max_tokens: z.number(maxTokensRange).int(maxTokensRange).min(1, maxTokensRange).max(maxUint32, maxTokensRange),
  seed: z.number(seedRange).int(seedRange),
  stop: z.array(stopString, stopRange).max(maxStopStrings, stopRange),
  cache_salt: z
    .string("must be a string")
    .refine((salt) => Buffer.byteLength(salt) <= maxCacheSaltBytes, `must have at most ${maxCacheSaltBytes} bytes`),
} as const;

/** Checks `input`. Throws INVALID_ARGUMENT that names the first wrong parameter and what it may be. */
export function parseRequest<S extends z.ZodType>(schema: S, input: unknown): z.output<S> {
  const parsed = schema.safeParse(input);
  if (parsed.success) {
    return parsed.data;
  }
  const issue = parsed.error.issues[0];
  if (issue?.code === "unrecognized_keys") {
    const name = [...issue.path, issue.keys[0]].join(".");
    throw new ClusterError("INVALID_ARGUMENT", `${name}: unknown parameter; remove it`, { parameter: name });
  }
  const parameter = issue?.path.join(".") ?? "";
  const message = parameter === "" ? "the body must be a JSON object" : `${parameter}: ${issue?.message}`;
  throw new ClusterError("INVALID_ARGUMENT", message, parameter === "" ? {} : { parameter });
}
