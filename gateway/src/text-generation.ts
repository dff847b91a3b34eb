import { randomBytes } from "node:crypto";
import { ClusterError, tenantNamespace, type Usage } from "@kivimesh/proto";
import type { Coordinator } from "./coordinator.ts";
import type { Detokenizer } from "./detokenizer.ts";
import type { GenerationInput, GenerationRequest } from "./generation-request.ts";
import type { RequestOutcome, RunningRequest } from "./running-request.ts";
import type { ModelCatalogue, ServedModel } from "./served-model.ts";
import { StopStrings } from "./stop-strings.ts";

/** API keys will name tenants; until then there is one. */
const onlyTenant = "default";
const maxLoggedIdCharacters = 128;

/** What the reader of a generation gets, in order; exactly one `finish` ends it. */
export type GenerationEvent =
  | {
      readonly kind: "delta";
      /** Whole characters; "" while one is unfinished or might begin a stop string. */
      readonly text: string;
      readonly tokenIds: readonly number[];
      /** f32 little-endian, one per vocabulary entry; only in the first and where asked for. */
      readonly firstLogits: Uint8Array | undefined;
    }
  | { readonly kind: "finish"; readonly reason: RequestOutcome; readonly usage: Usage };

/** A request that is in a worker's queue. */
export interface TextGeneration {
  readonly requestId: string;
  readonly model: ServedModel;
  /** Read once. Leaving it before its end ends the request everywhere. Throws ClusterErrors. */
  events(): AsyncGenerator<GenerationEvent, void, undefined>;
}

export interface TextGeneratorOptions {
  readonly coordinator: Coordinator;
  readonly catalogue: ModelCatalogue;
  readonly clusterSecret: string;
  readonly maxCompletionTokens: number;
}

/** Text in, text out: everything between the public APIs and tokens. */
export class TextGenerator {
  private readonly options: TextGeneratorOptions;

  constructor(options: TextGeneratorOptions) {
    this.options = options;
  }

  /** The prompt's token ids. Throws INVALID_ARGUMENT, MODEL_NOT_FOUND or NO_WORKER. */
  tokenize(modelName: string, input: GenerationInput): number[] {
    return promptTokens(this.options.catalogue.get(modelName), input);
  }

  /**
   * Checks the request against its model and queues it. Throws INVALID_ARGUMENT, MODEL_NOT_FOUND,
   * CONTEXT_LENGTH_EXCEEDED, or why it cannot be taken now (QUEUE_FULL, QUEUE_UNAVAILABLE, NO_WORKER, GATEWAY_DRAINING).
   * The request ends everywhere when `signal` aborts, whether it is being read or not.
   */
  async start(request: GenerationRequest, signal: AbortSignal): Promise<TextGeneration> {
    const { coordinator, catalogue, clusterSecret, maxCompletionTokens } = this.options;
    coordinator.admit();
    const model = catalogue.get(request.model);
    const prompt = promptTokens(model, request.input);
    const run = await coordinator.start({
      model,
      prompt,
      maxTokens: allowedTokens(model, prompt.length, request, maxCompletionTokens),
      temperature: request.temperature,
      topP: request.topP,
      topK: request.topK,
      seed: request.seed ?? randomBytes(8).readBigUInt64LE(),
      stopTokenIds: request.ignoreEos ? [] : model.endTokenIds,
      tenantNamespace: tenantNamespace(clusterSecret, onlyTenant, request.cacheSalt),
      returnFirstLogits: request.returnFirstLogits,
      workerId: request.workerId,
      clientRequestId: request.clientRequestId.slice(0, maxLoggedIdCharacters),
    });
    const text = new AnswerText(model.tokenizer.detokenizer(), new StopStrings(request.stop));
    const leave = () => {
      coordinator.cancel(run);
      run.fail(new ClusterError("CANCELLED", "the client has gone"));
    };
    signal.addEventListener("abort", leave, { once: true });
    if (signal.aborted) leave();
    return { requestId: run.id, model, events: () => readText(coordinator, run, text) };
  }
}

async function* readText(
  coordinator: Coordinator,
  run: RunningRequest,
  text: AnswerText,
): AsyncGenerator<GenerationEvent, void, undefined> {
  try {
    for await (const event of run.read()) {
      if (event.kind === "tokens") {
        if (text.stopped) continue;
        const { delta, taken } = text.push(event.ids);
        yield { kind: "delta", text: delta, tokenIds: event.ids.slice(0, taken), firstLogits: event.firstLogits };
        if (text.stopped) coordinator.stop(run, "stop", text.tokens);
      } else {
        const rest = text.finish();
        if (rest !== "") yield { kind: "delta", text: rest, tokenIds: [], firstLogits: undefined };
        yield { kind: "finish", reason: text.stopped ? "stop" : event.outcome, usage: event.usage };
      }
    }
  } finally {
    coordinator.cancel(run);
  }
}

/** Detokenizing and stop strings of one answer. */
class AnswerText {
  /** Tokens up to the end of the answer. */
  tokens = 0;
  private readonly detokenizer: Detokenizer;
  private readonly stops: StopStrings;

  constructor(detokenizer: Detokenizer, stops: StopStrings) {
    this.detokenizer = detokenizer;
    this.stops = stops;
  }

  get stopped(): boolean {
    return this.stops.stopped;
  }

  /** The text that `ids` add, and how many of them belong to the answer: all, unless a stop string ends it. */
  push(ids: readonly number[]): { delta: string; taken: number } {
    let delta = "";
    let taken = 0;
    for (const id of ids) {
      delta += this.stops.push(this.detokenizer.push(id));
      taken += 1;
      if (this.stopped) break;
    }
    this.tokens += taken;
    return { delta, taken };
  }

  finish(): string {
    return this.stopped ? "" : this.stops.push(this.detokenizer.finish()) + this.stops.finish();
  }
}

function promptTokens(model: ServedModel, input: GenerationInput): number[] {
  if (input.kind === "chat") {
    return model.tokenizer.encodeChat(input.turns);
  }
  const parameter = "prompt";
  const ids = input.kind === "text" ? model.tokenizer.encode(input.text) : [...input.ids];
  const unknown = ids.find((id) => id >= model.vocabulary);
  if (unknown !== undefined) {
    const range = `must be from 0 to ${model.vocabulary - 1}`;
    throw new ClusterError("INVALID_ARGUMENT", `prompt: token id ${unknown} is not in the vocabulary: ids ${range}`, {
      parameter,
    });
  }
  if (ids.length === 0) {
    throw new ClusterError("INVALID_ARGUMENT", "prompt: must not be empty", { parameter });
  }
  return ids;
}

function allowedTokens(model: ServedModel, prompt: number, request: GenerationRequest, limit: number): number {
  const asked = request.maxTokens;
  const room = model.contextTokens - prompt;
  const context = `the context of ${model.name} is ${model.contextTokens} tokens`;
  if (room < 1) {
    throw new ClusterError("CONTEXT_LENGTH_EXCEEDED", `the prompt has ${prompt} tokens; ${context}, answer included`, {
      parameter: request.input.kind === "chat" ? "messages" : "prompt",
    });
  }
  if (asked === undefined) {
    return Math.min(room, limit);
  }
  if (asked > room) {
    const sum = `the prompt's ${prompt} tokens and max_tokens ${asked} make ${prompt + asked}`;
    throw new ClusterError("CONTEXT_LENGTH_EXCEEDED", `${sum}; ${context}: use at most ${room}`, {
      parameter: "max_tokens",
    });
  }
  if (asked > limit) {
    throw new ClusterError("INVALID_ARGUMENT", `max_tokens: must be at most ${limit} at this gateway`, {
      parameter: "max_tokens",
    });
  }
  return asked;
}
