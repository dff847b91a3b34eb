import { create, type DescFile, toBinary } from "@bufbuild/protobuf";
import { type FileDescriptorProto, FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import type { Server } from "nice-grpc";
import { ServerReflection, ServerReflectionService } from "nice-grpc-server-reflection";
import type { ServiceDescriptor } from "./service-definition.ts";

/** Adds `grpc.reflection.v1` and the older `v1alpha` (same messages; many clients still ask for it only). */
export function addReflection(server: Server, services: readonly ServiceDescriptor[]): void {
  const files = create(FileDescriptorSetSchema, { file: filesOf(services) });
  const handlers = ServerReflection(
    toBinary(FileDescriptorSetSchema, files),
    services.map((service) => service.typeName),
  );
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
