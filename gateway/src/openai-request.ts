import { z } from "zod";
import type { Turn } from "./chat-template.ts";
import { type GenerationInput, type GenerationRequest, parseRequest, requestFields } from "./generation-request.ts";

const maxMessages = 4096;
/** OpenAI's default for plain completions. */
const defaultCompletionTokens = 16;

/** A checked body of /v1/chat/completions or /v1/completions. */
export interface OpenAiRequest {
  readonly generation: GenerationRequest;
  readonly stream: boolean;
  readonly includeUsage: boolean;
}

/** Read and dropped: they do not change the answer. */
const ignored = Object.fromEntries(
  [
    ...["user", "store", "metadata", "service_tier", "parallel_tool_calls", "prediction", "prompt_cache_key"],
    ...["prompt_cache_retention", "prompt_cache_options", "safety_identifier"],
  ].map((name) => [name, z.unknown().optional()]),
);

/** A parameter that would change the answer in a way that is not built: only its values without effect pass. */
function without(explanation: string, neutral: (value: unknown) => boolean) {
  return z
    .unknown()
    .optional()
    .refine((value) => value === undefined || value === null || neutral(value), explanation);
}

const isZero = (value: unknown) => value === 0;
const isOne = (value: unknown) => value === 1;
const isFalse = (value: unknown) => value === false;
const isEmpty = (value: unknown) => value !== null && typeof value === "object" && Object.keys(value).length === 0;
const never = () => false;

const content = z.union(
  [
    z.string(),
    z
      .array(z.object({ type: z.literal("text"), text: z.string() }))
      .min(1)
      .transform((parts) => parts.map((part) => part.text).join("")),
  ],
  "must be a string or a list of parts of type text; images, audio and files are not supported",
);

const roles = "must be one of system, developer, user, assistant; tools and functions are not supported";
const message = z
  .strictObject({
    role: z.enum(["system", "developer", "user", "assistant"], roles),
    content,
    name: z.string().nullish(),
    refusal: without("is not supported", never),
    audio: without("is not supported", never),
    tool_calls: without("tools are not supported", isEmpty),
    function_call: without("functions are not supported", never),
  })
  .transform((turn): Turn => ({ role: turn.role === "developer" ? "system" : turn.role, content: turn.content }));

const stop = z
  .union([z.string().transform((text) => [text]), z.array(z.string())], "must be a string or a list of strings")
  .pipe(requestFields.stop);

const shared = {
  model: z.string("must be the id of a model; /v1/models lists them"),
  temperature: requestFields.temperature.nullish(),
  top_p: requestFields.top_p.nullish(),
  // Other servers write "all" as -1.
  top_k: z.preprocess((value) => (value === -1 ? 0 : value), requestFields.top_k.nullish()),
  max_tokens: requestFields.max_tokens.nullish(),
  seed: requestFields.seed.nullish(),
  stop: stop.nullish(),
  stream: z.boolean("must be true or false").nullish(),
  stream_options: z
    .strictObject(
      {
        include_usage: z.boolean("must be true or false").nullish(),
        include_obfuscation: without("is not supported", isFalse),
      },
      "must be an object",
    )
    .nullish(),
  cache_salt: requestFields.cache_salt.nullish(),
  ignore_eos: z.boolean("must be true or false").nullish(),
  n: without("must be 1: one answer a request", isOne),
  frequency_penalty: without("is not supported: must be 0", isZero),
  presence_penalty: without("is not supported: must be 0", isZero),
  repetition_penalty: without("is not supported: must be 1", isOne),
  min_p: without("is not supported: must be 0", isZero),
  logit_bias: without("is not supported: must be empty", isEmpty),
};

const chatSchema = z.strictObject({
  ...ignored,
  ...shared,
  messages: z
    .array(message, "must be a list of messages")
    .min(1, "must have at least one message")
    .max(maxMessages, `must have at most ${maxMessages} messages`),
  max_completion_tokens: requestFields.max_tokens.nullish(),
  logprobs: without("is not supported: must be false", isFalse),
  top_logprobs: without("is not supported", isZero),
  tools: without("tools are not supported", isEmpty),
  tool_choice: without('tools are not supported: must be "none"', (value) => value === "none" || value === "auto"),
  functions: without("functions are not supported", isEmpty),
  function_call: without('functions are not supported: must be "none"', (value) => value === "none"),
  response_format: without(
    'must be {"type": "text"}: constrained answers are not supported',
    (value) => (value as { type?: unknown }).type === "text",
  ),
  modalities: without('must be ["text"]', (value) => JSON.stringify(value) === '["text"]'),
  audio: without("audio is not supported", never),
  reasoning_effort: without('is not supported: must be "none"', (value) => value === "none"),
  verbosity: without('is not supported: must be "medium"', (value) => value === "medium"),
  web_search_options: without("is not supported", never),
});

const tokenId = z.number().int().min(0);
const prompt = z.union(
  [
    z.string().transform((text): GenerationInput => ({ kind: "text", text })),
    z
      .array(tokenId)
      .min(1)
      .transform((ids): GenerationInput => ({ kind: "tokens", ids })),
    z.tuple([z.string()]).transform(([text]): GenerationInput => ({ kind: "text", text })),
    z.tuple([z.array(tokenId).min(1)]).transform(([ids]): GenerationInput => ({ kind: "tokens", ids })),
  ],
  "must be one string or one list of token ids (one prompt a request)",
);

const completionSchema = z.strictObject({
  ...ignored,
  ...shared,
  prompt,
  logprobs: without("is not supported", never),
  best_of: without("must be 1", isOne),
  echo: without("is not supported: must be false", isFalse),
  suffix: without("is not supported", (value) => value === ""),
});

/** What the headers say. */
export type RequestOrigin = Pick<GenerationRequest, "workerId" | "clientRequestId">;

/** Checks the body of /v1/chat/completions. Throws INVALID_ARGUMENT. */
export function parseChatRequest(body: unknown, origin: RequestOrigin): OpenAiRequest {
  const fields = parseRequest(chatSchema, body);
  const maxTokens = fields.max_completion_tokens ?? fields.max_tokens ?? undefined;
  return openAiRequest(fields, { kind: "chat", turns: fields.messages }, maxTokens, origin);
}

/** Checks the body of /v1/completions. Throws INVALID_ARGUMENT. */
export function parseCompletionRequest(body: unknown, origin: RequestOrigin): OpenAiRequest {
  const fields = parseRequest(completionSchema, body);
  return openAiRequest(fields, fields.prompt, fields.max_tokens ?? defaultCompletionTokens, origin);
}

type SharedFields = z.output<z.ZodObject<typeof shared>>;

function openAiRequest(
  fields: SharedFields,
  input: GenerationInput,
  maxTokens: number | undefined,
  origin: RequestOrigin,
): OpenAiRequest {
  return {
    generation: {
      model: fields.model,
      input,
      maxTokens,
      temperature: fields.temperature ?? 1,
      topP: fields.top_p ?? 1,
      topK: fields.top_k ?? 0,
      seed: fields.seed === undefined || fields.seed === null ? undefined : BigInt.asUintN(64, BigInt(fields.seed)),
      stop: fields.stop ?? [],
      ignoreEos: fields.ignore_eos ?? false,
      cacheSalt: fields.cache_salt ?? "",
      returnFirstLogits: false,
      ...origin,
    },
    stream: fields.stream ?? false,
    includeUsage: fields.stream_options?.include_usage ?? false,
  };
}
