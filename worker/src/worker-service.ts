import {
  blockChunks,
  ClusterError,
  type GetModelResponse,
  hex,
  implementService,
  type ServiceBinding,
  Worker,
} from "@kivimesh/proto";
import type { EngineClient } from "./engine-client.ts";
import { type GatewayStreams, loadOf } from "./gateway-streams.ts";
import type { TransferCounters } from "./kv-transfer.ts";

/** What the gRPC service shows of a worker. */
export interface WorkerParts {
  readonly engine: EngineClient;
  readonly streams: GatewayStreams;
  readonly transfer: { readonly counters: TransferCounters };
  readonly model: GetModelResponse;
  activeJobs(): number;
}

/** The gRPC service of a worker, for gateways, operators and tests. */
export function workerService({ engine, streams, transfer, model, activeJobs }: WorkerParts): ServiceBinding {
  return implementService(Worker, {
    async *subscribe({ gatewayId }, { signal }) {
      if (gatewayId === "") throw new ClusterError("INVALID_ARGUMENT", "a gateway needs an id");
      yield* streams.subscribe(gatewayId, signal);
    },
    async abort({ requestId, epoch }) {
      engine.abort(requestId, epoch);
      return {};
    },
    async getModel() {
      return model;
    },
    async getStats() {
      const stats = await engine.stats();
      const { fetchedBlocks, fetchedBytes, rejectedBlocks, publishedBlocks, heldLeases } = transfer.counters;
      return {
        load: loadOf(stats),
        referencedPages: stats.referencedPages,
        runningSequences: stats.running,
        heldLeases,
        activeJobs: activeJobs(),
        integrityViolations: [...stats.integrityViolations],
        gpuWeightBytes: BigInt(stats.memory.weights),
        gpuKvBytes: BigInt(stats.memory.kv),
        gpuActivationBytes: BigInt(stats.memory.activations),
        gpuOtherBytes: BigInt(stats.memory.other),
        fetchedBlocks: BigInt(fetchedBlocks),
        fetchedBytes: BigInt(fetchedBytes),
        rejectedBlocks: BigInt(rejectedBlocks),
        publishedBlocks: BigInt(publishedBlocks),
      };
    },
    async *readBlock({ blockId }) {
      const payload = await engine.readBlock(hex(blockId));
      if (payload === undefined) {
        throw new ClusterError("KV_BLOCK_NOT_FOUND", `block ${hex(blockId)} is not in this worker's GPU pool`);
      }
      for (const chunk of blockChunks(payload)) yield { chunk };
    },
  });
}
