/** Prometheus metrics of a worker, read from its reports when they are scraped. */
import { createRegistry } from "@kivimesh/proto";
import { Counter, Gauge, type Registry } from "prom-client";
import type { EngineStats } from "./engine-stats.ts";
import type { TransferCounters } from "./kv-transfer.ts";

/** Where the numbers come from. */
export interface MetricsSources {
  readonly workerId: string;
  readonly modelName: string;
  /** Kernel variants that the self-test refused. */
  readonly refusedVariants: readonly { readonly variant: string }[];
  stats(): EngineStats;
  readonly transfer: TransferCounters;
  activeJobs(): number;
  gateways(): number;
  discardedJobs(): number;
}

type Series = readonly { readonly labels?: Record<string, string>; readonly value: number }[];

/** A registry with the worker's series and the process's own. */
export function workerMetrics(sources: MetricsSources): Registry {
  const registry = createRegistry({ worker: sources.workerId });
  const { transfer } = sources;
  const one = (value: number): Series => [{ value }];
  const gauge = (name: string, help: string, read: () => Series, labelNames: string[] = []) =>
    new Gauge({
      name,
      help,
      labelNames,
      registers: [registry],
      collect() {
        for (const { labels, value } of read()) this.set(labels ?? {}, value);
      },
    });
  const counter = (name: string, help: string, read: () => Series, labelNames: string[] = []) =>
    new Counter({
      name,
      help,
      labelNames,
      registers: [registry],
      collect() {
        this.reset();
        for (const { labels, value } of read()) this.inc(labels ?? {}, value);
      },
    });
  engineSeries(sources, gauge, counter);
  gauge("kivimesh_worker_active_jobs", "Jobs taken from the queue and not ended", () => one(sources.activeJobs()));
  gauge("kivimesh_worker_gateways", "Gateways that are subscribed", () => one(sources.gateways()));
  counter("kivimesh_worker_discarded_jobs_total", "Jobs whose gateway was gone", () => one(sources.discardedJobs()));
  gauge("kivimesh_kv_leases_held", "Leases held at the cachestore", () => one(transfer.heldLeases));
  counter("kivimesh_kv_fetched_blocks_total", "Blocks taken from the cachestore", () => one(transfer.fetchedBlocks));
  counter("kivimesh_kv_fetched_bytes_total", "Payload bytes of those", () => one(transfer.fetchedBytes));
  counter("kivimesh_kv_rejected_blocks_total", "Fetched blocks that failed a check", () =>
    one(transfer.rejectedBlocks),
  );
  counter("kivimesh_kv_failed_fetches_total", "Fetches that the cachestore broke off", () =>
    one(transfer.failedFetches),
  );
  counter("kivimesh_kv_published_blocks_total", "Blocks stored at the cachestore", () => one(transfer.publishedBlocks));
  counter(
    "kivimesh_kernel_fallbacks_total",
    "Kernel variants that the self-test at start-up refused; plain ones run instead",
    () => sources.refusedVariants.map(({ variant }) => ({ labels: { variant }, value: 1 })),
    ["variant"],
  );
  counter("kivimesh_kv_published_bytes_total", "Payload bytes of those", () => one(transfer.publishedBytes));
  counter("kivimesh_kv_dropped_publishes_total", "Blocks not stored: queue full, page reused or store failed", () =>
    one(transfer.droppedPublishes),
  );
  compatibleGauges(sources, gauge);
  return registry;
}

type Define = (name: string, help: string, read: () => Series, labelNames?: string[]) => unknown;

function labelled(label: string, values: Readonly<Record<string, number>>): Series {
  return Object.entries(values).map(([name, value]) => ({ labels: { [label]: name }, value }));
}

function engineSeries({ stats }: MetricsSources, gauge: Define, counter: Define): void {
  const one = (read: (now: EngineStats) => number) => () => [{ value: read(stats()) }];
  gauge(
    "kivimesh_engine_running_sequences",
    "Sequences with a slot",
    one((now) => now.running),
  );
  gauge(
    "kivimesh_engine_waiting_sequences",
    "Sequences that wait or fetch",
    one((now) => now.waiting),
  );
  gauge(
    "kivimesh_kv_pages",
    "KV pages in the GPU pool",
    () => {
      const { freePages, referencedPages } = stats();
      return labelled("state", { available: freePages, referenced: referencedPages });
    },
    ["state"],
  );
  gauge(
    "kivimesh_kv_indexed_blocks",
    "Blocks in the prefix index",
    one((now) => now.indexedBlocks),
  );
  gauge("kivimesh_gpu_memory_bytes", "GPU memory by use", () => labelled("use", { ...stats().memory }), ["use"]);
  gauge(
    "kivimesh_integrity_violations",
    "Broken invariants; 0 is right",
    one((now) => now.integrityViolations.length),
  );
  gauge(
    "kivimesh_engine_prefill_tokens_per_second",
    "Measured prefill rate",
    one((now) => now.prefillTokensPerSecond),
  );
  counter(
    "kivimesh_engine_steps_total",
    "Steps run",
    one((now) => now.steps),
  );
  counter(
    "kivimesh_engine_prefill_tokens_total",
    "Tokens prefilled",
    one((now) => now.prefillTokens),
  );
  counter(
    "kivimesh_engine_decode_tokens_total",
    "Decode rows run",
    one((now) => now.decodeTokens),
  );
  counter(
    "kivimesh_engine_preemptions_total",
    "Sequences sent back to wait",
    one((now) => now.preemptions),
  );
  counter(
    "kivimesh_kv_evicted_pages_total",
    "Cached pages given to others",
    one((now) => now.evictedPages),
  );
  counter(
    "kivimesh_engine_submits_total",
    "Submits to the GPU; one may hold several decode steps",
    one((now) => now.submits),
  );
  const submit = () => labelled("where", { ...stats().submitSeconds });
  counter("kivimesh_engine_submit_seconds_total", "Seconds of submits: host, encode (part of host), gpu", submit, [
    "where",
  ]);
  const step = () => labelled("kind", { ...stats().stepSeconds });
  counter("kivimesh_engine_step_seconds_total", "Time spent in steps", step, ["kind"]);
  const source = () => labelled("source", { ...stats().promptTokensBySource });
  counter("kivimesh_prompt_tokens_total", "Prompt tokens by where their KV came from", source, ["source"]);
}

/** The gauges that autoscalers and inference gateways already read from other servers. */
function compatibleGauges({ stats, modelName }: MetricsSources, gauge: Define): void {
  const one = (read: (now: EngineStats) => number) => () => [
    { labels: { model_name: modelName }, value: read(stats()) },
  ];
  const label = ["model_name"];
  gauge(
    "vllm:num_requests_running",
    "As kivimesh_engine_running_sequences",
    one((now) => now.running),
    label,
  );
  gauge(
    "vllm:num_requests_waiting",
    "As kivimesh_engine_waiting_sequences",
    one((now) => now.waiting),
    label,
  );
  const usage = one((now) => now.referencedPages / now.totalPages);
  gauge("vllm:kv_cache_usage_perc", "Referenced share of the KV pages, 0 to 1", usage, label);
}
