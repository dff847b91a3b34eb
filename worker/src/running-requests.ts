import { ClusterError, Finished_Outcome, type GenerateJob, hex } from "@kivimesh/proto";
import type { GatewayStreams, StreamEvent } from "./gateway-streams.ts";
import type {
  FinishedEvent,
  GenerationEvent,
  GenerationOutcome,
  GenerationRequest,
  TokensEvent,
} from "./generation.ts";

/** What this needs of an engine. */
export interface RequestEngine {
  submit(request: GenerationRequest): void;
  abort(requestId: string, epoch: number): void;
}

interface RunningRequest {
  readonly requestId: string;
  readonly epoch: number;
  readonly gatewayId: string;
  /** Ends the job. */
  readonly done: () => void;
}

const outcomes: Record<GenerationOutcome, Finished_Outcome> = {
  stopToken: Finished_Outcome.STOP_TOKEN,
  length: Finished_Outcome.LENGTH,
  aborted: Finished_Outcome.ABORTED,
  failed: Finished_Outcome.FAILED,
};

/** Runs jobs on the engine and sends their events to the gateways that they came from. */
export class RunningRequests {
  readonly #engine: RequestEngine;
  readonly #streams: GatewayStreams;
  readonly #worker: { readonly id: string; readonly kvFormat: string; readonly modelDigest: Uint8Array };
  readonly #requests = new Map<string, RunningRequest>();
  #discarded = 0;
  #failure: ClusterError | undefined;

  constructor(
    engine: RequestEngine,
    streams: GatewayStreams,
    worker: { readonly id: string; readonly kvFormat: string; readonly modelDigest: Uint8Array },
  ) {
    this.#engine = engine;
    this.#streams = streams;
    this.#worker = worker;
  }

  get size(): number {
    return this.#requests.size;
  }

  /** Jobs that were not run because their gateway was gone. */
  get discarded(): number {
    return this.#discarded;
  }

  /** Runs one job to its end; never rejects because of what the job contains. */
  async run(job: GenerateJob, signal: AbortSignal): Promise<void> {
    if (!(await this.#streams.listens(job.gatewayId))) {
      this.#discarded += 1;
      return;
    }
    if (this.#failure !== undefined) {
      this.#refuse(job, this.#failure);
      return;
    }
    if (job.modelDigest !== hex(this.#worker.modelDigest)) {
      this.#refuse(job, new ClusterError("MODEL_MISMATCH", "this worker serves another model"));
      return;
    }
    const key = `${job.requestId}.${job.epoch}`;
    if (this.#requests.has(key)) return;
    const abort = () => this.#engine.abort(job.requestId, job.epoch);
    await new Promise<void>((resolve) => {
      const { requestId, epoch, gatewayId } = job;
      this.#requests.set(key, { requestId, epoch, gatewayId, done: resolve });
      signal.addEventListener("abort", abort, { once: true });
      this.#engine.submit(generationRequest(job));
      if (signal.aborted) abort();
    });
    signal.removeEventListener("abort", abort);
  }

  /** Sends an engine's events on. */
  deliver(events: readonly GenerationEvent[]): void {
    for (const event of events) {
      const key = `${event.requestId}.${event.epoch}`;
      const request = this.#requests.get(key);
      if (request === undefined) continue;
      const message = event.type === "tokens" ? tokensMessage(event) : this.#finishedMessage(event);
      this.#streams.send(request.gatewayId, message);
      if (event.type !== "finished") continue;
      this.#requests.delete(key);
      request.done();
    }
  }

  /** Aborts every request of a gateway that is gone. */
  abortGateway(gatewayId: string): void {
    for (const request of this.#requests.values()) {
      if (request.gatewayId === gatewayId) this.#engine.abort(request.requestId, request.epoch);
    }
  }

  /** Ends every request as failed, without asking the engine, and all that come later. */
  failAll(error: ClusterError): void {
    this.#failure ??= error;
    for (const [key, { requestId, epoch, gatewayId, done }] of this.#requests) {
      this.#requests.delete(key);
      this.#streams.send(gatewayId, failedMessage(requestId, epoch, error));
      done();
    }
  }

  #refuse({ requestId, epoch, gatewayId }: GenerateJob, error: ClusterError): void {
    this.#streams.send(gatewayId, failedMessage(requestId, epoch, error));
  }

  #finishedMessage({ requestId, epoch, outcome, usage, error }: FinishedEvent): StreamEvent {
    const value = {
      requestId,
      epoch,
      outcome: outcomes[outcome],
      usage: {
        promptTokens: usage.promptTokens,
        completionTokens: usage.completionTokens,
        cachedTokens: usage.sources.gpu + usage.sources.peer + usage.sources.cachestore,
        kivimesh: {
          worker: this.#worker.id,
          kvFormat: this.#worker.kvFormat,
          promptTokensBySource: usage.sources,
          kvF16Bytes: BigInt(usage.kvF16Bytes),
          kvStoredBytes: BigInt(usage.kvStoredBytes),
          fetchedBytes: BigInt(usage.fetchedBytes),
        },
      },
      errorCode: error?.code ?? "",
      errorMessage: error?.message ?? "",
    };
    return { event: { case: "finished", value } };
  }
}

function tokensMessage({ requestId, epoch, index, ids, firstLogits }: TokensEvent): StreamEvent {
  const logits =
    firstLogits === undefined
      ? new Uint8Array()
      : new Uint8Array(firstLogits.buffer, firstLogits.byteOffset, firstLogits.byteLength);
  return { event: { case: "tokens", value: { requestId, epoch, index, ids: [...ids], firstLogits: logits } } };
}

function failedMessage(requestId: string, epoch: number, { code, message }: ClusterError): StreamEvent {
  const outcome = Finished_Outcome.FAILED;
  return { event: { case: "finished", value: { requestId, epoch, outcome, errorCode: code, errorMessage: message } } };
}

function generationRequest(job: GenerateJob): GenerationRequest {
  return {
    requestId: job.requestId,
    epoch: job.epoch,
    tokens: Uint32Array.from(job.tokens),
    promptTokens: job.promptTokens,
    maxTokens: job.maxTokens,
    sampling: { temperature: job.temperature, topK: job.topK, topP: job.topP, seed: job.seed },
    stopTokenIds: job.stopTokenIds,
    tenantNamespace: job.tenantNamespace,
    deadlineUnixMs: Number(job.deadlineUnixMs),
    returnFirstLogits: job.returnFirstLogits,
  };
}
