import { readFileSync } from "node:fs";
import type { Coordinator } from "./coordinator.ts";
import type { QueueMonitor } from "./queue-monitor.ts";
import type { WorkerRegistry } from "./worker-registry.ts";

/** What the dashboard page polls. */
export interface DashboardState {
  readonly models: readonly string[];
  readonly workers: readonly {
    readonly id: string;
    readonly model: string;
    readonly kvFormat: string;
    readonly device: string;
    readonly draining: boolean;
    readonly running: number;
    readonly waiting: number;
    readonly freePages: number;
    readonly totalPages: number;
    readonly heldBlocks: number;
    readonly prefillTokensPerSecond: number;
  }[];
  readonly requests: { readonly running: number; readonly waiting: number };
  readonly queue: { readonly healthy: boolean; readonly waiting: number };
  /** Prompt tokens since the gateway started, by where their KV came from. */
  readonly promptTokensBySource: Readonly<Record<string, number>>;
  readonly completionTokens: number;
  readonly fetchedBytes: number;
}

/** Totals that the metrics count. */
export interface TokenTotals {
  readonly promptTokensBySource: Readonly<Record<string, number>>;
  readonly completionTokens: number;
  readonly fetchedBytes: number;
}

/** The page: one file without any other resource. Lies beside `src` and `dist`. */
export function readDashboardPage(): string {
  return readFileSync(new URL("../dashboard/index.html", import.meta.url), "utf8");
}

/** The cluster as this gateway sees it now. */
export function dashboardState(
  registry: WorkerRegistry,
  coordinator: Coordinator,
  monitor: QueueMonitor,
  totals: TokenTotals,
): DashboardState {
  return {
    models: registry.servedModels().map((model) => model.name),
    workers: registry
      .connected()
      .sort(byId)
      .map(({ id, linked, link }) => ({
        id,
        model: linked.model.name,
        kvFormat: linked.kvFormat,
        device: linked.device,
        draining: !link.announced,
        running: link.load?.running ?? 0,
        waiting: link.load?.waiting ?? 0,
        freePages: link.load?.freePages ?? 0,
        totalPages: link.load?.totalPages ?? 0,
        heldBlocks: link.held.size,
        prefillTokensPerSecond: link.load?.prefillTokensPerSecond ?? 0,
      })),
    requests: { running: coordinator.running, waiting: coordinator.waiting },
    queue: { healthy: monitor.healthy, waiting: monitor.waiting },
    ...totals,
  };
}

function byId(left: { id: string }, right: { id: string }): number {
  return left.id < right.id ? -1 : 1;
}
