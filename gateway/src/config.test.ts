import { expect, it } from "vitest";
import { defaultGatewayLimits, gatewayConfig, gatewayConfigFromEnvironment } from "./config.ts";

it("has defaults for everything on loopback, and a random id", () => {
  const config = gatewayConfig({}, () => "x");
  expect(config).toMatchObject({
    id: "gateway-x",
    host: "127.0.0.1",
    clusterSecret: "kivimesh-local",
    logLevel: "info",
  });
  expect(config.limits).toEqual(defaultGatewayLimits);
});

it("reads the environment and names a wrong variable", () => {
  const environment = { KIVIMESH_HTTP_PORT: "8000", KIVIMESH_LOG_LEVEL: "warn", KIVIMESH_MAX_REQUESTS: "7", HOME: "/" };
  const config = gatewayConfig(gatewayConfigFromEnvironment(environment), () => "x");
  expect(config).toMatchObject({ httpPort: 8000, logLevel: "warn" });
  expect(config.limits.maxRequests).toBe(7);
  expect(() => gatewayConfigFromEnvironment({ KIVIMESH_HTTP_PORT: "http" })).toThrow(/KIVIMESH_HTTP_PORT/);
  expect(() => gatewayConfigFromEnvironment({ KIVIMESH_MAX_REQUESTS: "0" })).toThrow(/KIVIMESH_MAX_REQUESTS/);
});
