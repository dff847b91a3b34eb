import type { ErrorCode, Usage } from "@kivimesh/proto";
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from "prom-client";
import type { Coordinator, CoordinatorObserver } from "./coordinator.ts";
import type { TokenTotals } from "./dashboard.ts";
import type { QueueMonitor } from "./queue-monitor.ts";
import type { RequestOutcome } from "./running-request.ts";
import type { WorkerRegistry } from "./worker-registry.ts";

const sources = ["gpu", "peer", "cachestore", "computed"] as const;
const latencyBuckets = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120];

/** The parts whose state gauges read at each scrape. */
export interface MeasuredGateway {
  readonly registry: WorkerRegistry;
  readonly coordinator: Coordinator;
  readonly monitor: QueueMonitor;
}

/** Prometheus metrics of a gateway: it observes the coordinator, and reads the rest when scraped. */
export class GatewayMetrics implements CoordinatorObserver {
  readonly registry = new Registry();
  private readonly firstTokenSeconds: Histogram;
  private readonly interTokenSeconds: Histogram;
  private readonly requestSeconds: Histogram<"outcome">;
  private readonly requests: Counter<"outcome">;
  private readonly refusals: Counter<"code">;
  private readonly requeues: Counter<"reason">;
  private readonly promptTokens: Counter<"source">;
  private readonly completionTokens: Counter;
  private readonly fetchedBytes: Counter;
  private readonly sums = { gpu: 0, peer: 0, cachestore: 0, computed: 0, completion: 0, fetchedBytes: 0 };

  constructor() {
    const registers = [this.registry];
    const histogram = (name: string, help: string) => new Histogram({ name, help, buckets: latencyBuckets, registers });
    this.firstTokenSeconds = histogram("kivimesh_time_to_first_token_seconds", "From admission to the first token");
    this.interTokenSeconds = histogram(
      "kivimesh_inter_token_latency_seconds",
      "Between consecutive tokens of an answer",
    );
    this.requestSeconds = new Histogram({
      name: "kivimesh_request_duration_seconds",
      help: "From admission to the end of the answer",
      labelNames: ["outcome"],
      buckets: latencyBuckets,
      registers,
    });
    this.requests = new Counter({
      name: "kivimesh_requests_total",
      help: "Admitted requests that ended: stop, length, cancelled or an error code",
      labelNames: ["outcome"],
      registers,
    });
    this.refusals = new Counter({
      name: "kivimesh_gateway_refusals_total",
      help: "Requests refused at admission, by error code",
      labelNames: ["code"],
      registers,
    });
    this.requeues = new Counter({
      name: "kivimesh_gateway_requeues_total",
      help: "Attempts given up and queued again with the next epoch",
      labelNames: ["reason"],
      registers,
    });
    this.promptTokens = new Counter({
      name: "kivimesh_prompt_tokens_total",
      help: "Prompt tokens of answered requests, by where their KV came from",
      labelNames: ["source"],
      registers,
    });
    this.completionTokens = new Counter({
      name: "kivimesh_completion_tokens_total",
      help: "Tokens generated for answered requests",
      registers,
    });
    this.fetchedBytes = new Counter({
      name: "kivimesh_kv_fetched_bytes_total",
      help: "Payload bytes of KV blocks fetched for answered requests",
      registers,
    });
    for (const source of sources) this.promptTokens.inc({ source }, 0);
    collectDefaultMetrics({ register: this.registry });
  }

  /** Adds the gauges. `compatibility` also exports them under the names that autoscalers for vLLM read. */
  watch(gateway: MeasuredGateway, compatibility: boolean): void {
    const { registry, coordinator, monitor } = gateway;
    this.gauge(
      "kivimesh_gateway_workers",
      "Live workers whose events this gateway receives",
      () => registry.live().length,
    );
    this.gauge("kivimesh_gateway_requests_running", "Requests in flight", () => coordinator.running);
    this.gauge(
      "kivimesh_gateway_requests_waiting",
      "Requests in flight without a first token",
      () => coordinator.waiting,
    );
    this.gauge("kivimesh_queue_jobs_waiting", "Jobs that wait in the queues of live workers", () => monitor.waiting);
    this.gauge("kivimesh_queue_reachable", "1 while the job queue answers", () => (monitor.healthy ? 1 : 0));
    if (compatibility) {
      const load = (field: "running" | "waiting") =>
        registry.live().reduce((sum, worker) => sum + (worker.link.load?.[field] ?? 0), 0);
      this.gauge("vllm:num_requests_running", "Sequences that run on the workers", () => load("running"));
      this.gauge("vllm:num_requests_waiting", "Sequences that wait at the workers or in their queues", () =>
        Math.max(load("waiting"), monitor.waiting),
      );
      this.gauge("vllm:kv_cache_usage_perc", "Used share of all KV pages, 0 to 1", () => usedShare(registry));
    }
  }

  firstToken(seconds: number): void {
    this.firstTokenSeconds.observe(seconds);
  }

  laterTokens(seconds: number, count: number): void {
    for (let index = 0; index < count; index++) {
      this.interTokenSeconds.observe(seconds / count);
    }
  }

  ended(how: RequestOutcome | ErrorCode, seconds: number, usage: Usage | undefined): void {
    const outcome = how.toLowerCase();
    this.requests.inc({ outcome });
    this.requestSeconds.observe({ outcome }, seconds);
    if (usage === undefined) {
      return;
    }
    for (const source of sources) {
      const count = usage.kivimesh?.promptTokensBySource?.[source] ?? 0;
      this.promptTokens.inc({ source }, count);
      this.sums[source] += count;
    }
    const fetched = Number(usage.kivimesh?.fetchedBytes ?? 0n);
    this.completionTokens.inc(usage.completionTokens);
    this.fetchedBytes.inc(fetched);
    this.sums.completion += usage.completionTokens;
    this.sums.fetchedBytes += fetched;
  }

  refused(code: ErrorCode): void {
    this.refusals.inc({ code: code.toLowerCase() });
  }

  requeued(reason: string): void {
    this.requeues.inc({ reason });
  }

  totals(): TokenTotals {
    const { completion, fetchedBytes, ...promptTokensBySource } = this.sums;
    return { promptTokensBySource, completionTokens: completion, fetchedBytes };
  }

  private gauge(name: string, help: string, read: () => number): void {
    new Gauge({
      name,
      help,
      registers: [this.registry],
      collect() {
        this.set(read());
      },
    });
  }
}

function usedShare(registry: WorkerRegistry): number {
  const loads = registry.live().flatMap((worker) => worker.link.load ?? []);
  const total = loads.reduce((sum, load) => sum + load.totalPages, 0);
  const free = loads.reduce((sum, load) => sum + load.freePages, 0);
  return total === 0 ? 0 : (total - free) / total;
}
