/** Runs plans on the GPU: each is one submit and one readback, and the next may be encoded before the last one ended. */
import { setTimeout as sleep } from "node:timers/promises";
import type { Gpu } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import type { ModelConfig } from "../model/model-config.ts";
import type { BlockTransfer } from "./block-transfer.ts";
import { gentleWait } from "./gentle-wait.ts";
import type { MemoryAccount } from "./memory-account.ts";
import type {
  KvGeometry,
  ModelRunner,
  RunnerDevice,
  RunnerLimits,
  RunnerMemory,
  SampledToken,
  StepPlan,
  StepResult,
} from "./model-runner.ts";
import type { PromptScorer } from "./prompt-scoring.ts";
import { checkStep } from "./step-check.ts";
import { type SampledRows, StepEncoder, sampledRows } from "./step-encoder.ts";
import type { ReadbackEntry, StepOutcome, StepReadback } from "./step-readback.ts";

/** Everything that a runner is made of; see open-model-runner.ts. */
export interface RunnerParts {
  readonly gpu: Gpu;
  readonly ownsGpu: boolean;
  readonly config: ModelConfig;
  readonly kv: KvGeometry;
  readonly limits: RunnerLimits;
  readonly memory: MemoryAccount;
  readonly blocks: BlockTransfer;
  readonly encoder: StepEncoder;
  readonly readback: StepReadback;
  readonly scorer: PromptScorer;
}

/** How long a failed step waits for the news that the device is lost. */
const LOST_GRACE_MILLISECONDS = 100;

function deviceLost(reason: string, cause?: unknown): ClusterError {
  return new ClusterError("DEVICE_LOST", `GPU lost: ${reason}`, { cause });
}

export class GpuModelRunner implements ModelRunner {
  readonly #parts: RunnerParts;
  #inFlight = 0;
  /** A step under way still needs its rows of the residual stream. */
  #scoring = false;
  #lost: string | undefined;
  #gpuError: string | undefined;

  constructor(parts: RunnerParts) {
    this.#parts = parts;
    void parts.gpu.lost.then((reason) => {
      this.#lost = reason;
    });
    parts.gpu.device.addEventListener("uncapturederror", this.#noteGpuError);
  }

  readonly #noteGpuError = (event: Event): void => {
    this.#gpuError ??= (event as GPUUncapturedErrorEvent).error.message;
  };

  get config(): ModelConfig {
    return this.#parts.config;
  }

  get kv(): KvGeometry {
    return this.#parts.kv;
  }

  get limits(): RunnerLimits {
    return this.#parts.limits;
  }

  get device(): RunnerDevice {
    const { name, profile, features, fallbacks = [] } = this.#parts.gpu;
    return { name, profile, features, fallbacks };
  }

  get lost(): Promise<string> {
    return this.#parts.gpu.lost;
  }

  memory(): RunnerMemory {
    return this.#parts.memory.total();
  }

  async step(plan: StepPlan): Promise<StepResult> {
    const scores = plan.prefill.some(({ score }) => score !== undefined);
    const most = scores || this.#scoring ? 1 : this.limits.maxStepsInFlight;
    if (this.#inFlight >= most) throw new ClusterError("INTERNAL", `more than ${most} steps were started at once`);
    checkStep(plan, this.limits, this.kv);
    if (this.#lost !== undefined) throw deviceLost(this.#lost);
    const entry = this.#parts.readback.take();
    this.#inFlight += 1;
    this.#scoring = scores;
    try {
      return await this.#run(plan, entry);
    } catch (error) {
      throw await this.#explain(error);
    } finally {
      this.#inFlight -= 1;
      if (scores) this.#scoring = false;
    }
  }

  async readBlock(page: number): Promise<Uint8Array> {
    try {
      return await this.#parts.blocks.read(page);
    } catch (error) {
      throw await this.#explain(error);
    }
  }

  writeBlock(page: number, payload: Uint8Array): void {
    this.#parts.blocks.write(page, payload);
  }

  async close(): Promise<void> {
    const { gpu, memory, ownsGpu } = this.#parts;
    if (this.#lost === undefined) await gpu.device.queue.onSubmittedWorkDone();
    gpu.device.removeEventListener("uncapturederror", this.#noteGpuError);
    memory.destroy();
    if (ownsGpu) await gpu.close();
  }

  /** A lost device first shows as some other failure; the reason follows soon after. */
  async #explain(error: unknown): Promise<unknown> {
    if (error instanceof ClusterError) return error;
    const reason = await Promise.race([this.#parts.gpu.lost, sleep(LOST_GRACE_MILLISECONDS, undefined)]);
    return reason === undefined ? error : deviceLost(reason, error);
  }

  async #run(plan: StepPlan, entry: ReadbackEntry): Promise<StepResult> {
    const started = performance.now();
    const { gpu, encoder, readback, scorer } = this.#parts;
    const sampling = sampledRows(plan);
    const timed = StepEncoder.timed(sampling);
    try {
      encoder.submit(plan, sampling, entry);
    } catch (error) {
      readback.give(entry);
      throw error;
    }
    const encoded = performance.now();
    const results = readback.read(entry, sampling.slots.length, sampling.logits, timed);
    const outcome = await gentleWait(results, gpu.profile === "software");
    if (this.#gpuError !== undefined) throw new ClusterError("INTERNAL", `GPU error: ${this.#gpuError}`);
    const scores: { slot: number; logprobs: Float32Array }[] = [];
    let row = 0;
    for (const { slot, tokens, score } of plan.prefill) {
      if (score !== undefined) scores.push({ slot, logprobs: await scorer.score(row, score) });
      row += tokens.length;
    }
    const seconds = { encode: (encoded - started) / 1000, wall: (performance.now() - started) / 1000 };
    return { ...stepTokens(sampling, outcome), scores, seconds: { ...seconds, gpu: outcome.gpuSeconds } };
  }
}

/** Tokens by slot, and the slots that failed. */
function stepTokens(
  { slots, logitsRows }: SampledRows,
  { sampled, status, logits }: StepOutcome,
): Pick<StepResult, "sampled" | "nonFiniteSlots"> {
  const failed = new Set<number>();
  for (let slot = 0; slot < status.length; slot++) if (status[slot] !== 0) failed.add(slot);
  const tokens = sampled.map(({ token, logprob, nonFinite }, index): SampledToken => {
    const slot = slots[index] as number;
    if (nonFinite) failed.add(slot);
    const logitsRow = logitsRows[index];
    if (logitsRow === undefined) return { slot, token, logprob };
    return { slot, token, logprob, logits: logits[logitsRow] as Float32Array };
  });
  return { sampled: tokens, nonFiniteSlots: [...failed] };
}
