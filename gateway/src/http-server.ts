import { Readable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import { ClusterError, toClusterError } from "@kivimesh/proto";
import fastify, {
  type FastifyBaseLogger,
  type FastifyInstance,
  type FastifyReply,
  type FastifyRequest,
  LogController,
} from "fastify";
import type { Logger } from "pino";
import type { ResolvedGatewayConfig } from "./config.ts";
import type { DashboardState } from "./dashboard.ts";
import { OpenAiAnswer, type OpenAiEndpoint, type OpenAiFinishReason } from "./openai-answer.ts";
import { openAiError } from "./openai-error.ts";
import { type OpenAiRequest, parseChatRequest, parseCompletionRequest, type RequestOrigin } from "./openai-request.ts";
import type { RequestOutcome } from "./running-request.ts";
import type { ServedModel } from "./served-model.ts";
import { sseDone, sseEvent, withPings } from "./sse.ts";
import type { TextGeneration, TextGenerator } from "./text-generation.ts";

const closePollMs = 10;
/** How long a client may take to send its request. */
const receiveTimeoutMs = 30_000;
/** Pins a request to one worker (operators and tests). */
const workerHeader = "x-kivimesh-worker";

export interface HttpServerOptions {
  readonly config: ResolvedGatewayConfig;
  readonly generator: TextGenerator;
  readonly log: Logger;
  readonly models: () => readonly ServedModel[];
  /** Throws MODEL_NOT_FOUND or NO_WORKER. */
  readonly model: (name: string) => ServedModel;
  /** Why a request would not be served now; undefined: it would. */
  readonly notReady: () => string | undefined;
  readonly metrics: () => Promise<{ contentType: string; text: string }>;
  readonly dashboardPage: string;
  readonly dashboardState: () => Promise<DashboardState>;
}

export interface HttpServer {
  readonly fastify: FastifyInstance;
  /** Waits until every answer has been sent, at most `graceMs`, then closes all connections. */
  close(graceMs: number): Promise<void>;
}

/** The OpenAI endpoints, health, metrics and the dashboard. Not listening yet. */
export function httpServer(options: HttpServerOptions): HttpServer {
  const { config, log } = options;
  const server = newServer(options);
  server.setErrorHandler((error, _request, reply) =>
    sendError(reply, httpError(error, config.limits.maxBodyBytes, log)),
  );
  server.setNotFoundHandler((request, reply) =>
    sendError(reply, new ClusterError("NOT_FOUND", `no such endpoint: ${request.method} ${request.url.split("?")[0]}`)),
  );
  const open = new Set<FastifyReply>();
  server.addHook("onRequest", async (_request, reply) => {
    open.add(reply);
    reply.raw.once("close", () => open.delete(reply));
  });
  addOpenAiRoutes(server, options);
  addOperatorRoutes(server, options);
  const close = async (graceMs: number) => {
    const until = Date.now() + graceMs;
    while (open.size > 0 && Date.now() < until) {
      await delay(closePollMs);
    }
    await server.close();
  };
  return { fastify: server, close };
}

function newServer({ config, log }: HttpServerOptions): FastifyInstance {
  const loggerInstance: FastifyBaseLogger = log;
  const common = {
    loggerInstance,
    logController: new LogController({ disableRequestLogging: true }),
    bodyLimit: config.limits.maxBodyBytes,
    forceCloseConnections: true,
    requestTimeout: receiveTimeoutMs,
  };
  if (config.tls === undefined) {
    return fastify(common);
  }
  const { certificate, key } = config.tls;
  // The routes use nothing in which the types of the two servers differ.
  return fastify({ ...common, https: { cert: certificate, key } }) as unknown as FastifyInstance;
}

function addOpenAiRoutes(server: FastifyInstance, options: HttpServerOptions): void {
  server.get("/v1/models", async () => ({ object: "list", data: options.models().map(openAiModel) }));
  server.get<{ Params: { "*": string } }>("/v1/models/*", async (request) =>
    openAiModel(options.model(request.params["*"])),
  );
  server.post("/v1/chat/completions", (request, reply) =>
    complete("chat", parseChatRequest(request.body, origin(request)), reply, options),
  );
  server.post("/v1/completions", (request, reply) =>
    complete("completion", parseCompletionRequest(request.body, origin(request)), reply, options),
  );
}

function addOperatorRoutes(server: FastifyInstance, options: HttpServerOptions): void {
  server.get("/healthz", async () => ({ status: "ok" }));
  server.get("/readyz", async (_request, reply) => {
    const reason = options.notReady();
    return reason === undefined ? { status: "ready" } : reply.code(503).send({ status: "not ready", reason });
  });
  server.get("/metrics", async (_request, reply) => {
    const { contentType, text } = await options.metrics();
    return reply.header("content-type", contentType).send(text);
  });
  server.get("/", (_request, reply) =>
    reply.header("content-type", "text/html; charset=utf-8").send(options.dashboardPage),
  );
  server.get("/dashboard.json", () => options.dashboardState());
}

async function complete(
  endpoint: OpenAiEndpoint,
  request: OpenAiRequest,
  reply: FastifyReply,
  options: HttpServerOptions,
): Promise<FastifyReply> {
  const gone = new AbortController();
  reply.raw.once("close", () => {
    if (!reply.raw.writableFinished) gone.abort();
  });
  // A client that left while its body was parsed has closed already, and "close" comes once.
  if (reply.raw.destroyed) gone.abort();
  const generation = await options.generator.start(request.generation, gone.signal);
  const answer = new OpenAiAnswer(endpoint, {
    requestId: generation.requestId,
    model: generation.model.name,
    createdSeconds: Math.floor(Date.now() / 1000),
    fingerprint: `kivimesh-${generation.model.digestHex.slice(0, 12)}`,
  });
  reply.header("x-request-id", generation.requestId);
  if (!request.stream) {
    return reply.send(await wholeAnswer(generation, answer));
  }
  const events = sseAnswer(generation, answer, request.includeUsage, gone.signal, options.log);
  return reply
    .header("content-type", "text/event-stream; charset=utf-8")
    .header("cache-control", "no-cache, no-transform")
    .header("x-accel-buffering", "no")
    .send(Readable.from(withPings(events, options.config.limits.ssePingMs)));
}

async function wholeAnswer(generation: TextGeneration, answer: OpenAiAnswer) {
  let text = "";
  for await (const event of generation.events()) {
    if (event.kind === "delta") {
      text += event.text;
    } else {
      return answer.body(text, finishReason(event.reason), event.usage);
    }
  }
  throw new ClusterError("INTERNAL", "the request ended without a finish");
}

/** The stream of one answer. A failure becomes an error event: never a bare cut. */
async function* sseAnswer(
  generation: TextGeneration,
  answer: OpenAiAnswer,
  includeUsage: boolean,
  signal: AbortSignal,
  log: Logger,
): AsyncGenerator<string> {
  try {
    const opening = answer.opening(includeUsage);
    if (opening !== undefined) yield sseEvent(opening);
    for await (const event of generation.events()) {
      if (event.kind === "delta") {
        if (event.text !== "") yield sseEvent(answer.textChunk(event.text, includeUsage));
        continue;
      }
      yield sseEvent(answer.finishChunk(finishReason(event.reason), includeUsage));
      if (includeUsage) yield sseEvent(answer.usageChunk(event.usage));
    }
    yield sseDone;
  } catch (error) {
    const known = httpError(error, 0, log);
    if (!signal.aborted) {
      log.warn(
        { request: generation.requestId, code: known.code, reason: known.message },
        "stream ended with an error",
      );
      yield sseEvent(openAiError(known).body);
    }
  }
}

/** OpenAI has no word for an answer that an operator cancelled: that is an error. */
function finishReason(outcome: RequestOutcome): OpenAiFinishReason {
  if (outcome === "cancelled") {
    throw new ClusterError("CANCELLED", "the request was cancelled");
  }
  return outcome;
}

function origin({ headers }: FastifyRequest): RequestOrigin {
  const text = (value: string | string[] | undefined) => (typeof value === "string" ? value : "");
  return { workerId: text(headers[workerHeader]), clientRequestId: text(headers["x-request-id"]) };
}

function openAiModel(model: ServedModel) {
  return {
    id: model.name,
    object: "model",
    created: model.createdUnixSeconds,
    owned_by: "kivimesh",
    context_tokens: model.contextTokens,
    kv_format: model.kvFormat,
    digest: model.digestHex,
  };
}

function sendError(reply: FastifyReply, error: ClusterError): FastifyReply {
  const { status, retryAfterSeconds, body } = openAiError(error);
  if (retryAfterSeconds !== undefined) {
    reply.header("retry-after", String(retryAfterSeconds));
  }
  return reply.code(status).header("content-type", "application/json; charset=utf-8").send(body);
}

/** Errors of the HTTP layer itself in the catalogue's words; unforeseen ones are logged. */
function httpError(error: unknown, bodyLimit: number, log: Logger): ClusterError {
  const code = error instanceof Error && "code" in error ? error.code : undefined;
  const statusCode = error instanceof Error && "statusCode" in error ? error.statusCode : undefined;
  if (code === "FST_ERR_CTP_BODY_TOO_LARGE") {
    return new ClusterError("REQUEST_TOO_LARGE", `the body is larger than ${bodyLimit} bytes`);
  }
  if (code === "FST_ERR_CTP_INVALID_MEDIA_TYPE") {
    return new ClusterError("INVALID_ARGUMENT", "the body must have the content type application/json");
  }
  if (!(error instanceof ClusterError) && typeof statusCode === "number" && statusCode >= 400 && statusCode < 500) {
    return new ClusterError("INVALID_ARGUMENT", "the body is not valid JSON", { cause: error });
  }
  const known = toClusterError(error);
  if (known.code === "INTERNAL") {
    log.error({ err: error }, "internal error");
  }
  return known;
}
