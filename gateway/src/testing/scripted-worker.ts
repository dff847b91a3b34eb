/**
 * A worker for the gateway's tests: the real Worker service over real gRPC, fed by the real queue and announced in the
 * real membership. Only the model is made up: it answers every prompt with the same text, and misbehaves on request.
 */
import { createHash } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import {
  type AbortRequest,
  type Announcement,
  blockIds,
  ClusterError,
  chainRoot,
  Finished_Outcome,
  type GenerateJob,
  type GrpcServer,
  implementService,
  type JobConsumer,
  type JobQueues,
  type Membership,
  serveGrpc,
  type TlsFiles,
  Worker,
} from "@kivimesh/proto";
import { ModelTokenizer } from "../tokenizer.ts";
import { byteLevelSource } from "./tokenizers.ts";

type WireEvent =
  | {
      case: "tokens";
      value: { requestId: string; epoch: number; index: number; ids: number[]; firstLogits?: Uint8Array };
    }
  | {
      case: "finished";
      value: {
        requestId: string;
        epoch: number;
        outcome: Finished_Outcome;
        usage?: object;
        errorCode?: string;
        errorMessage?: string;
      };
    }
  | {
      case: "load";
      value: {
        running: number;
        waiting: number;
        prefillTokensPerSecond: number;
        totalPages: number;
        freePages: number;
      };
    }
  | { case: "prefix"; value: { added?: Uint8Array[]; cleared?: boolean } };

/** How the worker behaves; tests change it at any time. */
export interface Behaviour {
  /** The answer to every prompt. */
  answer: string;
  /** Between two messages of tokens. */
  delayMs: number;
  tokensPerMessage: number;
  /** Completion tokens (over all attempts) before which the worker waits, until it is raised. */
  pauseAt: number;
  /** Fails each job with this code. */
  failure: string | undefined;
  /** Sends each message twice, and now and then one of an older epoch. */
  repeats: boolean;
  /** Leaves out the message that contains this completion index, once. */
  skipIndex: number | undefined;
  /** Goes on after an abort, as one that has not heard it yet. */
  ignoresAborts: boolean;
}

export interface ScriptedWorkerOptions {
  readonly id: string;
  readonly jobQueues: JobQueues;
  readonly membership: Membership;
  readonly behaviour?: Partial<Behaviour>;
  readonly concurrency?: number;
  readonly contextTokens?: number;
  readonly modelName?: string;
  readonly tls?: TlsFiles;
}

const blockTokens = 32;
const kvFormatId = 2;

export class ScriptedWorker {
  readonly id: string;
  readonly jobs: GenerateJob[] = [];
  readonly aborts: AbortRequest[] = [];
  readonly behaviour: Behaviour;
  readonly source = byteLevelSource();
  private readonly options: ScriptedWorkerOptions;
  private readonly tokenizer: ModelTokenizer;
  private readonly streams = new Map<string, (event: WireEvent) => void>();
  private readonly aborted = new Set<string>();
  private readonly heldIds: Uint8Array[] = [];
  private server: GrpcServer | undefined;
  private consumer: JobConsumer | undefined;
  private announcement: Announcement | undefined;
  private running = 0;
  private dead = false;

  private constructor(options: ScriptedWorkerOptions) {
    this.id = options.id;
    this.options = options;
    this.tokenizer = new ModelTokenizer(this.source);
    this.behaviour = {
      ...{ answer: "Hello 😀 world", delayMs: 1, tokensPerMessage: 2, pauseAt: Number.POSITIVE_INFINITY },
      ...{ failure: undefined, repeats: false, skipIndex: undefined, ignoresAborts: false },
      ...options.behaviour,
    };
  }

  static async start(options: ScriptedWorkerOptions): Promise<ScriptedWorker> {
    const worker = new ScriptedWorker(options);
    await worker.serve(0);
    await worker.consume();
    await worker.announce();
    return worker;
  }

  get address(): string {
    return this.server?.address ?? "";
  }

  get runningJobs(): number {
    return this.running;
  }

  /** Leaves the membership; streams go on. */
  async withdraw(): Promise<void> {
    await this.announcement?.withdraw();
  }

  /** Joins the membership; at `address`, where it is reached through something else. */
  async announce(address = this.address): Promise<void> {
    this.announcement = await this.options.membership.announce({ id: this.id, role: "worker", address });
  }

  /** Ends as a killed process would: connections break, nothing is said. */
  async crash(): Promise<void> {
    this.dead = true;
    this.streams.clear();
    await this.server?.shutdown(0);
    await this.consumer?.close();
  }

  async close(): Promise<void> {
    await this.withdraw();
    await this.crash();
  }

  /** The blocks of `tokens` enter the pool. */
  hold(tokens: readonly number[], tenantNamespace: Uint8Array): void {
    const root = chainRoot({
      modelDigest: this.digest,
      formatId: kvFormatId,
      blockTokens,
      residualTokens: blockTokens,
      tenantNamespace,
    });
    const ids = blockIds(root, tokens, blockTokens);
    this.heldIds.push(...ids);
    for (const send of this.streams.values()) send({ case: "prefix", value: { added: ids } });
  }

  get digest(): Uint8Array {
    return createHash("sha256").update("scripted").digest();
  }

  private async serve(port: number): Promise<void> {
    const worker = this;
    const { tls } = this.options;
    this.server = await serveGrpc({
      port,
      ...(tls === undefined ? {} : { tls }),
      services: [
        implementService(Worker, {
          async *subscribe(request, context) {
            yield* worker.stream(request.gatewayId, context.signal);
          },
          async abort(request) {
            worker.aborts.push(request);
            worker.aborted.add(`${request.requestId}.${request.epoch}`);
            return {};
          },
          async getModel() {
            return {
              ...{
                name: worker.options.modelName ?? "scripted",
                digest: worker.digest,
                kvFormat: "kivi2r",
                kvFormatId,
              },
              tokenizerJson: worker.source.tokenizerJson,
              tokenizerConfigJson: worker.source.tokenizerConfigJson,
              chatTemplate: worker.source.chatTemplate,
              endTokenIds: [...worker.source.endTokenIds],
              beginTokenId: -1,
              contextTokens: worker.options.contextTokens ?? 512,
              vocabulary: worker.source.vocabulary,
              ...{ blockTokens, residualTokens: blockTokens, blockBytes: 1000n, device: "script", workerId: worker.id },
            };
          },
          async getStats() {
            return {};
          },
          async *readBlock() {
            yield await Promise.reject(new ClusterError("NOT_FOUND", "no blocks here"));
          },
        }),
      ],
    });
  }

  private async *stream(gatewayId: string, signal: AbortSignal) {
    const waiting: WireEvent[] = [
      {
        case: "load",
        value: { running: this.running, waiting: 0, prefillTokensPerSecond: 1000, totalPages: 10, freePages: 5 },
      },
      { case: "prefix", value: { cleared: true, added: [...this.heldIds] } },
    ];
    let wake = () => {};
    this.streams.set(gatewayId, (event) => {
      waiting.push(event);
      wake();
    });
    signal.addEventListener("abort", () => wake());
    while (!signal.aborted && !this.dead) {
      const event = waiting.shift();
      if (event !== undefined) yield { event };
      else
        await new Promise<void>((resolve) => {
          wake = resolve;
        });
    }
  }

  private async consume(): Promise<void> {
    this.consumer = await this.options.jobQueues.consume(this.id, (job) => this.work(job), {
      concurrency: this.options.concurrency ?? 8,
    });
  }

  private async work(job: GenerateJob): Promise<void> {
    if (this.dead) return;
    this.jobs.push(job);
    this.running += 1;
    try {
      await this.generate(job);
    } finally {
      this.running -= 1;
    }
  }

  private async generate(job: GenerateJob): Promise<void> {
    const { behaviour } = this;
    const attempt = { requestId: job.requestId, epoch: job.epoch };
    const send = (event: WireEvent) => this.streams.get(job.gatewayId)?.(event);
    if (behaviour.failure !== undefined) {
      const value = {
        ...attempt,
        outcome: Finished_Outcome.FAILED,
        errorCode: behaviour.failure,
        errorMessage: "scripted",
      };
      send({ case: "finished", value });
      return;
    }
    const earlier = job.tokens.length - job.promptTokens;
    const answer = this.tokenizer.encode(behaviour.answer).slice(earlier);
    const ids = answer.slice(0, job.maxTokens);
    for (let index = 0; index < ids.length; ) {
      const count = Math.min(behaviour.tokensPerMessage, ids.length - index);
      while (earlier + index >= behaviour.pauseAt && !this.isOver(job)) await delay(5);
      if (this.isOver(job)) break;
      const part = ids.slice(index, index + count);
      const firstLogits = job.returnFirstLogits && index === 0 ? { firstLogits: new Uint8Array([1, 2, 3, 4]) } : {};
      const skip = behaviour.skipIndex;
      if (skip !== undefined && earlier + index <= skip && skip < earlier + index + count) {
        behaviour.skipIndex = undefined;
      } else {
        send({ case: "tokens", value: { ...attempt, index, ids: part, ...firstLogits } });
        if (behaviour.repeats) {
          send({ case: "tokens", value: { ...attempt, index, ids: part } });
          send({ case: "tokens", value: { ...attempt, epoch: job.epoch - 1, index, ids: [65] } });
        }
      }
      index += count;
      await delay(behaviour.delayMs);
    }
    if (this.dead) return;
    const whole = job.maxTokens >= answer.length;
    const done = whole ? Finished_Outcome.STOP_TOKEN : Finished_Outcome.LENGTH;
    const outcome = this.isOver(job) ? Finished_Outcome.ABORTED : done;
    send({ case: "finished", value: { ...attempt, outcome, usage: this.usage(job) } });
  }

  private isOver(job: GenerateJob): boolean {
    if (this.dead) return true;
    return !this.behaviour.ignoresAborts && this.aborted.has(`${job.requestId}.${job.epoch}`);
  }

  private usage(job: GenerateJob): object {
    return {
      promptTokens: job.promptTokens,
      kivimesh: {
        ...{ worker: this.id, kvFormat: "kivi2r", kvF16Bytes: 3000n, kvStoredBytes: 600n, fetchedBytes: 1000n },
        promptTokensBySource: { gpu: 1, peer: 0, cachestore: 2, computed: job.promptTokens - 3 },
      },
    };
  }
}
