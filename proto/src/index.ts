export { type ErrorCode, type ErrorKind, errorCatalogue, errorCodeOf, isErrorCode } from "./error-catalogue.ts";
export { ClusterError, errorTrailer, fromRpcError, toClusterError, toServerError } from "./errors.ts";
export {
  Cachestore,
  type EventsResponse,
  EventsResponseSchema,
  type FetchRequest,
  type FetchResponse,
  type LookupRequest,
  type LookupResponse,
  type StatsResponse,
  type StoreRequest,
  StoreRequestSchema,
  type StoreResponse,
} from "./gen/kivimesh/v1/cachestore_pb.ts";
export {
  type CancelRequest,
  type Chat,
  type ChatMessage,
  type Finish,
  FinishReason,
  type GenerateRequest,
  GenerateRequestSchema,
  type GenerateResponse,
  GenerateResponseSchema,
  Inference,
  type ListModelsResponse,
  type Model,
  type Sampling,
  type TextDelta,
  type TokenizeRequest,
  type TokenizeResponse,
} from "./gen/kivimesh/v1/inference_pb.ts";
export { type KvBlockHeader, KvBlockHeader_Provenance, KvBlockHeaderSchema } from "./gen/kivimesh/v1/kv_block_pb.ts";
export {
  type PromptTokensBySource,
  PromptTokensBySourceSchema,
  type Usage,
  type Usage_Kivimesh,
  UsageSchema,
} from "./gen/kivimesh/v1/usage_pb.ts";
export {
  type AbortRequest,
  type Finished,
  Finished_Outcome,
  FinishedSchema,
  type GenerateJob,
  GenerateJobSchema,
  type GetModelResponse,
  GetModelResponseSchema,
  type GetStatsResponse,
  GetStatsResponseSchema,
  type Load,
  LoadSchema,
  type PrefixChange,
  PrefixChangeSchema,
  type ReadBlockRequest,
  type ReadBlockResponse,
  type SubscribeRequest,
  type SubscribeResponse,
  SubscribeResponseSchema,
  type Tokens,
  TokensSchema,
  Worker,
} from "./gen/kivimesh/v1/worker_pb.ts";
export {
  assertSecureListener,
  channelOptions,
  hostAndPort,
  isLoopback,
  maxMessageBytes,
  type TlsFiles,
} from "./grpc-channel.ts";
export { type ClientOptions, createClient, type RpcClient } from "./grpc-client.ts";
export {
  type GrpcServer,
  type GrpcServerOptions,
  implementService,
  type ServiceBinding,
  serveGrpc,
} from "./grpc-server.ts";
export {
  type JobConsumer,
  type JobHandler,
  type JobQueues,
  maxJobPriority,
  type QueueCounts,
  queueDeadlineMs,
} from "./job-queue.ts";
export {
  blockChunks,
  collectBlock,
  collectBlocks,
  describeBlock,
  type ExpectedKvBlock,
  type KvBlockDescription,
  type KvBlockPart,
  type KvBlockShape,
  kvBlockMagic,
  kvBlockVersion,
  kvChunkBytes,
  maxKvPayloadBytes,
  type ReceivedKvBlock,
  verifyBlock,
  verifyHeader,
  verifyPayload,
} from "./kv-block.ts";
export { localMembership } from "./local-membership.ts";
export { createLogger, type Logger, type LogLevel } from "./logging.ts";
export { type Announcement, type Member, type MemberRole, type Membership, memberTtlMs } from "./membership.ts";
export { createRegistry, type MetricsServer, type MetricsServerOptions, serveMetrics } from "./metrics.ts";
export { openPglitePool, type PglitePool, type PglitePoolOptions } from "./pglite-pool.ts";
export { plainBytes } from "./plain-bytes.ts";
export { type PgliteQueueOptions, pgliteJobQueues, postgresJobQueues } from "./postgres-job-queues.ts";
export {
  blockIdBytes,
  blockIds,
  type ChainRootParts,
  chainRoot,
  hex,
  maxCacheSaltBytes,
  tenantNamespace,
} from "./prefix-hash.ts";
export { redisJobQueues } from "./redis-job-queues.ts";
export { redisMembership } from "./redis-membership.ts";
export {
  type GrpcServiceDefinition,
  type ServiceDescriptor,
  type ServiceHandlers,
  serviceDefinition,
} from "./service-definition.ts";
