/** Composes a worker: engine thread, gRPC service, job consumer, KV transfer, metrics. */
import { create } from "@bufbuild/protobuf";
import {
  type Announcement,
  ClusterError,
  createLogger,
  type GetModelResponse,
  GetModelResponseSchema,
  type GrpcServer,
  hex,
  type JobConsumer,
  type JobQueues,
  type Logger,
  type LogLevel,
  type Membership,
  type MetricsServer,
  serveGrpc,
  serveMetrics,
} from "@kivimesh/proto";
import { CachestoreLink } from "./cachestore-link.ts";
import { checkWorkerConfig, type WorkerConfig } from "./config.ts";
import { EngineClient } from "./engine-client.ts";
import type { ModelDescription } from "./engine-messages.ts";
import type { EngineStats } from "./engine-stats.ts";
import { GatewayStreams } from "./gateway-streams.ts";
import { KvTransfer, type TransferCounters } from "./kv-transfer.ts";
import { workerMetrics } from "./metrics.ts";
import { RunningRequests } from "./running-requests.ts";
import { requireFreeId } from "./worker-identity.ts";
import { workerService } from "./worker-service.ts";

/** Jobs taken for each sequence that can run: enough to fetch prefixes ahead. The rest wait in the queue. */
const jobsPerSequence = 4;
/** Of an ending worker: for blocks that are not stored yet, and for streams to be read to their end. */
const flushMs = 3_000;
const shutdownMs = 1_000;
const drainPollMs = 20;

/** What a worker shares with the rest of its cluster. The caller opens and closes them. */
export interface WorkerSeams {
  readonly jobQueues: JobQueues;
  readonly membership: Membership;
}

export interface WorkerService {
  readonly id: string;
  /** `host:port` of the gRPC listener. */
  readonly address: string;
  /** `http://host:port/metrics`, where a metrics port was given. */
  readonly metricsUrl: string | undefined;
  /** What GetModel answers. */
  readonly model: GetModelResponse;
  /** Loaded, listening, announced and not draining. */
  ready(): boolean;
  stats(): Promise<EngineStats>;
  /** Blocks to and from the cachestore, so far. */
  readonly transfers: Readonly<TransferCounters>;
  /** Resolves with the reason if the GPU or its thread is gone; the worker is of no use then: exit and restart. */
  readonly failed: Promise<Error>;
  /** Leaves the membership, finishes running requests for up to `graceMs`, then closes. At once after a failure. */
  drain(graceMs: number): Promise<void>;
  /** Ends at once; running requests end as aborted. */
  close(): Promise<void>;
}

/** @throws ClusterError INVALID_ARGUMENT, MODEL_…, GPU_UNAVAILABLE, QUEUE_UNAVAILABLE. */
export async function startWorker(config: WorkerConfig, seams: WorkerSeams): Promise<WorkerService> {
  const checked = checkWorkerConfig(config);
  const logger = createLogger("worker", (checked.logLevel ?? "info") as LogLevel).child({ worker: checked.id });
  await requireFreeId(seams.membership, checked.id);
  const engine = await EngineClient.start(checked, (done, total) => checked.onProgress?.(done, total, "weights"));
  const worker = new RunningWorker(checked, seams, engine, logger);
  try {
    await worker.open();
  } catch (error) {
    await worker.close();
    throw error;
  }
  const { model } = engine;
  for (const fallback of model.device.fallbacks) {
    logger.warn({ device: model.device.name, ...fallback }, "the self-test refused a kernel variant");
  }
  logger.info(
    {
      model: model.name,
      kv: model.kv.format.name,
      device: model.device.name,
      profile: model.device.profile,
      features: model.device.features,
      address: worker.address,
    },
    "worker is ready",
  );
  return worker;
}

class RunningWorker implements WorkerService {
  readonly id: string;
  readonly model: GetModelResponse;
  readonly failed: Promise<Error>;
  readonly #config: WorkerConfig;
  readonly #seams: WorkerSeams;
  readonly #engine: EngineClient;
  readonly #logger: Logger;
  readonly #link: CachestoreLink;
  readonly #transfer: KvTransfer;
  readonly #streams: GatewayStreams;
  readonly #requests: RunningRequests;
  #server: GrpcServer | undefined;
  #metrics: MetricsServer | undefined;
  #consumer: JobConsumer | undefined;
  #announcement: Announcement | undefined;
  #stopWatching: () => void = () => undefined;
  #ready = false;
  #closing: Promise<void> | undefined;

  constructor(config: WorkerConfig, seams: WorkerSeams, engine: EngineClient, logger: Logger) {
    const { kv, digest } = engine.model;
    this.id = config.id;
    this.#config = config;
    this.#seams = seams;
    this.#engine = engine;
    this.#logger = logger;
    this.model = modelResponse(config, engine.model);
    this.#link = new CachestoreLink(config.tls);
    this.#transfer = new KvTransfer({
      link: this.#link,
      identity: { modelDigest: digest, kv, numerics: config.numerics ?? "invariant" },
      logger,
      readBlock: (id) => engine.readBlock(id),
    });
    this.#streams = new GatewayStreams((gatewayId) => {
      logger.info({ gatewayId }, "a gateway is gone; its requests end");
      this.#requests.abortGateway(gatewayId);
    });
    const worker = { id: config.id, kvFormat: kv.format.name, modelDigest: digest };
    this.#requests = new RunningRequests(engine, this.#streams, worker);
    this.#streams.load(engine.lastStats);
    engine.attachTransfer(this.#transfer);
    engine.listen({
      onEvents: (events) => this.#requests.deliver(events),
      onPrefixChange: (change) => this.#streams.prefix(change),
      onStats: (stats) => this.#streams.load(stats),
    });
    this.failed = engine.failed.then((error) => this.#fail(error));
  }

  get address(): string {
    return this.#server?.address ?? "";
  }

  get metricsUrl(): string | undefined {
    return this.#metrics === undefined ? undefined : `${this.#metrics.url}/metrics`;
  }

  get transfers(): Readonly<TransferCounters> {
    return this.#transfer.counters;
  }

  ready(): boolean {
    return this.#ready;
  }

  stats(): Promise<EngineStats> {
    return this.#engine.stats();
  }

  /** Opens everything that others see, in the order in which they may use it. */
  async open(): Promise<void> {
    const { jobQueues, membership } = this.#seams;
    await this.#findCachestore();
    await this.#serve();
    const concurrency = Math.min(256, this.#engine.model.limits.maxSequences * jobsPerSequence);
    const run: Parameters<JobQueues["consume"]>[1] = (job, signal) => this.#requests.run(job, signal);
    this.#consumer = await jobQueues.consume(this.id, run, { concurrency });
    if (this.#engine.failure !== undefined) throw this.#engine.failure;
    const modelDigestHex = hex(this.#engine.model.digest);
    this.#announcement = await membership.announce({
      id: this.id,
      role: "worker",
      address: this.address,
      modelDigestHex,
    });
    this.#ready = true;
    this.#server?.setServing(true);
  }

  async drain(graceMs: number): Promise<void> {
    const until = performance.now() + graceMs;
    await this.#leave();
    // After a failure nothing runs that could be waited for.
    if (this.#closing === undefined && this.#engine.failure === undefined) {
      this.#engine.drain();
      while (this.#requests.size > 0 && performance.now() < until) {
        await new Promise((resolve) => setTimeout(resolve, drainPollMs));
      }
      await this.#transfer.flush(Math.max(0, Math.min(flushMs, until - performance.now())));
    }
    await this.close();
  }

  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #findCachestore(): Promise<void> {
    const { cachestoreAddress } = this.#config;
    if (cachestoreAddress !== undefined) {
      this.#link.setAddress(cachestoreAddress);
      return;
    }
    const { membership } = this.#seams;
    const [first] = await membership.list("cachestore");
    this.#link.setAddress(first?.address);
    this.#stopWatching = membership.watch("cachestore", ([member]) => this.#link.setAddress(member?.address));
  }

  async #serve(): Promise<void> {
    const { host, port, tls, allowInsecure, metricsPort } = this.#config;
    const activeJobs = () => this.#consumer?.activeJobs() ?? 0;
    this.#server = await serveGrpc({
      port: port ?? 0,
      services: [
        workerService({
          engine: this.#engine,
          streams: this.#streams,
          transfer: this.#transfer,
          model: this.model,
          activeJobs,
        }),
      ],
      onInternalError: (error, method) => this.#logger.error({ error, method }, "a call failed"),
      ...(host === undefined ? {} : { host }),
      ...(tls === undefined ? {} : { tls }),
      ...(allowInsecure === undefined ? {} : { allowInsecure }),
    });
    if (metricsPort === undefined) return;
    const registry = workerMetrics({
      workerId: this.id,
      modelName: this.model.name,
      refusedVariants: this.#engine.model.device.fallbacks,
      stats: () => this.#engine.lastStats,
      transfer: this.#transfer.counters,
      activeJobs,
      gateways: () => this.#streams.size,
      discardedJobs: () => this.#requests.discarded,
    });
    const options = { port: metricsPort, registry, isReady: () => this.#ready };
    this.#metrics = await serveMetrics(host === undefined ? options : { ...options, host });
  }

  /** Takes no new work: others are told before anything ends. */
  async #leave(): Promise<void> {
    this.#ready = false;
    this.#server?.setServing(false);
    const announcement = this.#announcement;
    this.#announcement = undefined;
    await announcement?.withdraw().catch((error: unknown) => {
      this.#logger.warn({ error }, "the membership could not be left; it ends by itself");
    });
  }

  async #fail(error: ClusterError): Promise<Error> {
    this.#logger.fatal({ code: error.code, message: error.message }, "the engine failed");
    const told = new ClusterError(error.code === "DEVICE_LOST" ? "DEVICE_LOST" : "WORKER_LOST", error.message);
    this.#requests.failAll(told);
    // What still waits in the queue is the gateways' to send elsewhere: they see this worker leave.
    await this.#consumer?.pause().catch((cause: unknown) => {
      this.#logger.warn({ cause }, "the queue could not be paused; jobs that still come fail at once");
    });
    await this.#leave();
    return error;
  }

  async #close(): Promise<void> {
    await this.#leave();
    this.#stopWatching();
    this.#engine.drain();
    // Running handlers are told to abort; their engine events still reach the gateways.
    await this.#consumer?.close();
    this.#transfer.close();
    this.#streams.close();
    await this.#server?.shutdown(shutdownMs);
    await this.#metrics?.close();
    await this.#engine.close();
  }
}

function modelResponse(config: WorkerConfig, model: ModelDescription): GetModelResponse {
  const { kv, limits, tokenizer } = model;
  return create(GetModelResponseSchema, {
    name: config.modelName ?? model.name,
    digest: model.digest,
    tokenizerJson: tokenizer.tokenizerJson,
    tokenizerConfigJson: tokenizer.tokenizerConfigJson,
    chatTemplate: tokenizer.chatTemplate,
    endTokenIds: [...tokenizer.endTokenIds],
    beginTokenId: tokenizer.beginTokenId,
    contextTokens: limits.maxContextTokens,
    vocabulary: limits.vocabulary,
    kvFormat: kv.format.name,
    kvFormatId: kv.formatId,
    blockTokens: kv.blockTokens,
    residualTokens: kv.residualTokens,
    blockBytes: BigInt(kv.blockBytes),
    device: model.device.name,
    workerId: config.id,
  });
}
