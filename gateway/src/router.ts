/** What the router knows of a live worker. */
export interface RouterWorker {
  readonly id: string;
  /** Workers of one format can use each other's blocks: model digest, KV format, block and residual size. */
  readonly format: string;
  readonly blockTokens: number;
  readonly blockBytes: number;
  /** Hex ids of the blocks in its GPU pool. */
  readonly held: ReadonlySet<string>;
  readonly running: number;
  readonly waiting: number;
  readonly waitingPromptTokens: number;
  /** Measured; 0: not yet known. */
  readonly prefillTokensPerSecond: number;
}

/** What the router knows of a request. */
export interface RouterRequest {
  readonly promptTokens: number;
  /** Hex ids of the prompt's full blocks for each format, in order. */
  readonly blockIds: ReadonlyMap<string, readonly string[]>;
}

/** Assumptions behind the estimates. */
export interface RouterAssumptions {
  /** Whether a cachestore is known, so that blocks held by one worker can reach another. */
  readonly fetchable: boolean;
  readonly fetchBytesPerSecond: number;
  /** For workers that have not measured theirs. */
  readonly prefillTokensPerSecond: number;
  /** How much a sequence that runs already delays the next one's first token. */
  readonly secondsPerSequence: number;
}

/** 1 Gbit/s links; a GPU-less worker; one decode step of one. */
export const defaultRouterAssumptions: RouterAssumptions = {
  fetchable: false,
  fetchBytesPerSecond: 100e6,
  prefillTokensPerSecond: 100,
  secondsPerSequence: 0.05,
};

/** A worker with the estimate that chose it. */
export interface RouterChoice {
  readonly workerId: string;
  /** Estimated time to the first token: the sum of the three parts, in seconds. */
  readonly seconds: number;
  readonly prefillSeconds: number;
  readonly fetchSeconds: number;
  readonly waitSeconds: number;
  /** Prompt tokens in the worker's own pool, and those it should fetch from the cachestore. */
  readonly heldTokens: number;
  readonly fetchTokens: number;
}

/**
 * The worker with the shortest estimated time to the first token: wait + fetch of blocks that others hold + prefill of
 * the rest. Fetching counts only where it is faster than computing. Ties go to the fewest sequences, then to the
 * smallest id. Pure; undefined where `workers` is empty.
 */
export function chooseWorker(
  request: RouterRequest,
  workers: readonly RouterWorker[],
  assumptions: RouterAssumptions = defaultRouterAssumptions,
): RouterChoice | undefined {
  const sequences = new Map(workers.map((worker) => [worker.id, worker.running + worker.waiting]));
  const choices = workers.map((worker) => estimate(request, worker, workers, assumptions));
  return choices.sort(
    (left, right) =>
      left.seconds - right.seconds ||
      (sequences.get(left.workerId) ?? 0) - (sequences.get(right.workerId) ?? 0) ||
      (left.workerId < right.workerId ? -1 : 1),
  )[0];
}

function estimate(
  request: RouterRequest,
  worker: RouterWorker,
  workers: readonly RouterWorker[],
  assumptions: RouterAssumptions,
): RouterChoice {
  const rate = worker.prefillTokensPerSecond > 0 ? worker.prefillTokensPerSecond : assumptions.prefillTokensPerSecond;
  const ids = reusableIds(request, worker);
  const held = leading(ids, (id) => worker.held.has(id));
  const known = assumptions.fetchable
    ? leading(ids, (id) => workers.some((other) => other.format === worker.format && other.held.has(id)))
    : held;
  const fetchBlocks = Math.max(0, known - held);
  const fetchAll = (fetchBlocks * worker.blockBytes) / assumptions.fetchBytesPerSecond;
  const fetches = fetchAll < (fetchBlocks * worker.blockTokens) / rate;
  const fetchTokens = fetches ? fetchBlocks * worker.blockTokens : 0;
  const heldTokens = held * worker.blockTokens;
  const prefillSeconds = (request.promptTokens - heldTokens - fetchTokens) / rate;
  const fetchSeconds = fetches ? fetchAll : 0;
  const waitSeconds =
    worker.waitingPromptTokens / rate + (worker.running + worker.waiting) * assumptions.secondsPerSequence;
  return {
    workerId: worker.id,
    seconds: prefillSeconds + fetchSeconds + waitSeconds,
    prefillSeconds,
    fetchSeconds,
    waitSeconds,
    heldTokens,
    fetchTokens,
  };
}

/** A prompt's last token is always computed, so a block that ends with it is of no use. */
function reusableIds(request: RouterRequest, worker: RouterWorker): readonly string[] {
  const ids = request.blockIds.get(worker.format) ?? [];
  return ids.slice(0, Math.max(0, Math.floor((request.promptTokens - 1) / worker.blockTokens)));
}

function leading(ids: readonly string[], holds: (id: string) => boolean): number {
  const missing = ids.findIndex((id) => !holds(id));
  return missing === -1 ? ids.length : missing;
}
