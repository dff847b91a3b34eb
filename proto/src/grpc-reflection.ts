import { create, type DescFile, toBinary } from "@bufbuild/protobuf";
import {
  FieldDescriptorProto_Label,
  FieldDescriptorProto_Type,
  type FileDescriptorProto,
  FileDescriptorProtoSchema,
  FileDescriptorSetSchema,
} from "@bufbuild/protobuf/wkt";
import type { Server } from "nice-grpc";
import { ServerReflection, ServerReflectionService } from "nice-grpc-server-reflection";
import type { ServiceDescriptor } from "./service-definition.ts";

/** grpc/health/v1/health.proto, which every server serves beside its own; its library brings no descriptor. */
const healthFile = create(FileDescriptorProtoSchema, {
  name: "grpc/health/v1/health.proto",
  package: "grpc.health.v1",
  syntax: "proto3",
  messageType: [
    { name: "HealthCheckRequest", field: [onlyField("service", FieldDescriptorProto_Type.STRING)] },
    {
      name: "HealthCheckResponse",
      field: [
        {
          ...onlyField("status", FieldDescriptorProto_Type.ENUM),
          typeName: ".grpc.health.v1.HealthCheckResponse.ServingStatus",
        },
      ],
      enumType: [
        {
          name: "ServingStatus",
          value: ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"].map((name, number) => ({ name, number })),
        },
      ],
    },
  ],
  service: [{ name: "Health", method: [healthMethod("Check", false), healthMethod("Watch", true)] }],
});

/** Adds `grpc.reflection.v1` and the older `v1alpha` (same messages; many clients still ask for it only). */
export function addReflection(server: Server, services: readonly ServiceDescriptor[]): void {
  const files = create(FileDescriptorSetSchema, { file: [...filesOf(services), healthFile] });
  const handlers = ServerReflection(toBinary(FileDescriptorSetSchema, files), [
    ...services.map((service) => service.typeName),
    "grpc.health.v1.Health",
  ]);
  const info = ServerReflectionService.serverReflectionInfo;
  server.add({ serverReflectionInfo: info }, handlers);
  const path = info.path.replace(".v1.", ".v1alpha.");
  server.add({ serverReflectionInfo: { ...info, path } }, handlers);
}

/** The services' files with all their imports, each once, imports first. */
function filesOf(services: readonly ServiceDescriptor[]): FileDescriptorProto[] {
  const files = new Map<string, FileDescriptorProto>();
  const visit = (file: DescFile): void => {
    if (!files.has(file.proto.name)) {
      file.dependencies.forEach(visit);
      files.set(file.proto.name, file.proto);
    }
  };
  for (const service of services) {
    visit(service.file);
  }
  return [...files.values()];
}

function onlyField(name: string, type: FieldDescriptorProto_Type) {
  return { name, jsonName: name, number: 1, type, label: FieldDescriptorProto_Label.OPTIONAL };
}

function healthMethod(name: string, serverStreaming: boolean) {
  const [inputType, outputType] = [".grpc.health.v1.HealthCheckRequest", ".grpc.health.v1.HealthCheckResponse"];
  return { name, inputType, outputType, serverStreaming };
}
