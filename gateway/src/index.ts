export {
  defaultGatewayLimits,
  type GatewayConfig,
  type GatewayLimits,
  gatewayConfigFromEnvironment,
} from "./config.ts";
export { type Gateway, type GatewaySeams, startGateway } from "./gateway.ts";
