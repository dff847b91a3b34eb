/** A gateway with scripted workers in this process, for tests: real HTTP, gRPC, queue and membership. */
import {
  createClient,
  Inference,
  type JobQueues,
  localMembership,
  type Membership,
  pgliteJobQueues,
  type RpcClient,
} from "@kivimesh/proto";
import type { GatewayConfig } from "../config.ts";
import { type Gateway, startGateway } from "../gateway.ts";
import { ScriptedWorker, type ScriptedWorkerOptions } from "./scripted-worker.ts";

/** Polls until `condition` holds. Throws after 10 s, naming what was waited for. */
export async function until(what: string, condition: () => boolean | Promise<boolean>): Promise<void> {
  const deadline = Date.now() + 10_000;
  while (!(await condition())) {
    if (Date.now() > deadline) throw new Error(`still waiting for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

export class TestCluster implements AsyncDisposable {
  readonly jobQueues: JobQueues;
  readonly membership: Membership;
  readonly workers: ScriptedWorker[] = [];
  readonly gateways: Gateway[] = [];
  private readonly clients: { close(): void }[] = [];

  private readonly ownQueues: boolean;

  private constructor(jobQueues: JobQueues, ownQueues: boolean, membership: Membership) {
    this.jobQueues = jobQueues;
    this.ownQueues = ownQueues;
    this.membership = membership;
  }

  /** Given queues stay their owner's; others live in an embedded Postgres, which takes seconds to start. */
  static async start(jobQueues?: JobQueues, membership?: Membership): Promise<TestCluster> {
    const ownQueues = jobQueues === undefined;
    return new TestCluster(jobQueues ?? (await pgliteJobQueues()), ownQueues, membership ?? localMembership());
  }

  async worker(id: string, options: Partial<ScriptedWorkerOptions> = {}): Promise<ScriptedWorker> {
    const { jobQueues, membership } = this;
    const worker = await ScriptedWorker.start({ ...options, id, jobQueues, membership });
    this.workers.push(worker);
    return worker;
  }

  /** Starts a gateway and waits until it sees `this.workers`. */
  async gateway(config: GatewayConfig = {}): Promise<Gateway> {
    const { jobQueues, membership } = this;
    const gateway = await startGateway({ logLevel: "silent", ...config }, { jobQueues, membership });
    this.gateways.push(gateway);
    await this.seen(gateway, this.workers.length);
    return gateway;
  }

  /** Waits until the gateway has `count` live workers. */
  async seen(gateway: Gateway, count: number): Promise<void> {
    await until(`${count} workers`, async () => (await metric(gateway, "kivimesh_gateway_workers")) === count);
  }

  client(gateway: Gateway): RpcClient<typeof Inference> {
    const client = createClient(Inference, gateway.grpcAddress);
    this.clients.push(client);
    return client;
  }

  /** Waits until nothing waits or runs anywhere. */
  async quiet(): Promise<void> {
    await until("a quiet cluster", async () => {
      const counts = await Promise.all(this.workers.map((worker) => this.jobQueues.counts(worker.id)));
      const running = await Promise.all(
        this.gateways.map((gateway) => metric(gateway, "kivimesh_gateway_requests_running")),
      );
      return [...counts.flatMap((count) => [count.active, count.waiting]), ...running].every((value) => value === 0);
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const client of this.clients) client.close();
    await Promise.all(this.gateways.map((gateway) => gateway.close()));
    await Promise.all(this.workers.map((worker) => worker.close()));
    await this.membership.close();
    if (this.ownQueues) await this.jobQueues.close();
  }
}

/** One value of /metrics; labels as they are written there. Undefined where it is not exported. */
export async function metric(gateway: Gateway, name: string): Promise<number | undefined> {
  const text = await (await fetch(`${gateway.httpUrl}/metrics`)).text();
  const line = text.split("\n").find((candidate) => candidate.startsWith(`${name} `));
  return line === undefined ? undefined : Number(line.slice(name.length + 1));
}
