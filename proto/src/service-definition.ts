import {
  create,
  type DescMessage,
  fromBinary,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from "@bufbuild/protobuf";
import type { GenService, GenServiceMethods } from "@bufbuild/protobuf/codegenv2";
import type { MethodDefinition, RawServiceImplementation } from "nice-grpc";
import { plainBytes } from "./plain-bytes.ts";

type StreamsRequest = { unary: false; server_streaming: false; client_streaming: true; bidi_streaming: true };
type StreamsResponse = { unary: false; server_streaming: true; client_streaming: false; bidi_streaming: true };

/** A generated service descriptor (`Worker`, `Cachestore`, `Inference`). */
export type ServiceDescriptor = GenService<GenServiceMethods>;

/** The nice-grpc definition of a service: callers may pass plain objects, and receive whole messages. */
export type GrpcServiceDefinition<D extends ServiceDescriptor> = {
  [M in keyof D["method"]]: MethodDefinition<
    MessageInitShape<D["method"][M]["input"]>,
    MessageShape<D["method"][M]["input"]>,
    MessageInitShape<D["method"][M]["output"]>,
    MessageShape<D["method"][M]["output"]>,
    StreamsRequest[D["method"][M]["methodKind"]],
    StreamsResponse[D["method"][M]["methodKind"]]
  >;
};

/** What a server implements: one async function or async generator for each method, with the call's context second. */
export type ServiceHandlers<D extends ServiceDescriptor> = RawServiceImplementation<GrpcServiceDefinition<D>>;

/** Turns a generated service descriptor into a nice-grpc definition over @bufbuild/protobuf messages. */
export function serviceDefinition<D extends ServiceDescriptor>(descriptor: D): GrpcServiceDefinition<D> {
  const methods = descriptor.methods.map((method) => [
    method.localName,
    {
      path: `/${descriptor.typeName}/${method.name}`,
      requestStream: method.methodKind === "client_streaming" || method.methodKind === "bidi_streaming",
      responseStream: method.methodKind === "server_streaming" || method.methodKind === "bidi_streaming",
      ...codec("request", method.input),
      ...codec("response", method.output),
      options: {},
    },
  ]);
  // The keys come from a run-time list, so the compiler cannot see that they are the descriptor's own.
  return Object.fromEntries(methods) as GrpcServiceDefinition<D>;
}

function codec(side: "request" | "response", message: DescMessage) {
  return {
    [`${side}Serialize`]: (value: MessageInitShape<DescMessage>) => toBinary(message, create(message, value)),
    [`${side}Deserialize`]: (bytes: Uint8Array) => fromBinary(message, plainBytes(bytes)),
  };
}
