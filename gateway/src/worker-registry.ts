import type { GetModelResponse, Member, Membership } from "@kivimesh/proto";
import { ModelCatalogue, type ServedModel } from "./served-model.ts";
import { type LinkedModel, type WorkerEvents, WorkerLink, type WorkerLinkOptions } from "./worker-link.ts";

/** A worker that can be given jobs. */
export interface LiveWorker {
  readonly id: string;
  readonly linked: LinkedModel;
  readonly link: WorkerLink;
}

export interface WorkerRegistryOptions extends Omit<WorkerLinkOptions, "events"> {
  readonly membership: Membership;
  /** Receives the events of all workers. */
  readonly events: Omit<WorkerEvents, "described">;
}

/** Follows the membership: one link for each announced worker, and the models that they serve. */
export class WorkerRegistry {
  readonly catalogue = new ModelCatalogue();
  private readonly links = new Map<string, WorkerLink>();
  private readonly options: WorkerRegistryOptions;
  private readonly linkOptions: WorkerLinkOptions;
  private readonly stopWatching: (() => void)[] = [];
  private readonly joinWaiters = new Set<() => void>();
  private cachestoreCount = 0;

  constructor(options: WorkerRegistryOptions) {
    this.options = options;
    const { events } = options;
    this.linkOptions = {
      gatewayId: options.gatewayId,
      tls: options.tls,
      limits: options.limits,
      log: options.log,
      events: {
        described: (model) => this.described(model),
        joined: (workerId) => {
          for (const wake of this.joinWaiters) wake();
          this.joinWaiters.clear();
          events.joined(workerId);
        },
        tokens: (workerId, tokens) => events.tokens(workerId, tokens),
        finished: (workerId, finished) => events.finished(workerId, finished),
        lost: (workerId, reason) => {
          this.drop(workerId);
          events.lost(workerId, reason);
        },
      },
    };
  }

  /** Begins to follow. */
  start(): void {
    const { membership } = this.options;
    this.stopWatching.push(membership.watch("worker", (members) => this.update(members)));
    this.stopWatching.push(
      membership.watch("cachestore", (members) => {
        this.cachestoreCount = members.length;
      }),
    );
  }

  /** Whether blocks can move between workers. */
  get hasCachestore(): boolean {
    return this.cachestoreCount > 0;
  }

  /** Workers that stream events, draining ones included. */
  connected(): LiveWorker[] {
    return [...this.links.values()].flatMap((link) =>
      link.linked === undefined ? [] : [{ id: link.id, linked: link.linked, link }],
    );
  }

  /** Workers that can take a job now. */
  live(): LiveWorker[] {
    return this.connected().filter((worker) => worker.link.announced);
  }

  /** The models of live workers. */
  servedModels(): ServedModel[] {
    const names = new Set(this.live().map((worker) => worker.linked.model.name));
    return this.catalogue.list().filter((model) => names.has(model.name));
  }

  /** Resolves when a worker joins, or after `timeoutMs`. */
  nextJoin(timeoutMs: number): Promise<void> {
    return new Promise((resolve) => {
      const wake = () => {
        clearTimeout(timer);
        this.joinWaiters.delete(wake);
        resolve();
      };
      const timer = setTimeout(wake, timeoutMs);
      this.joinWaiters.add(wake);
    });
  }

  /** Stops an attempt. Returns whether the worker heard it. */
  async abort(workerId: string, requestId: string, epoch: number): Promise<boolean> {
    return (await this.links.get(workerId)?.abort(requestId, epoch)) ?? false;
  }

  close(): void {
    for (const stop of this.stopWatching) stop();
    for (const link of this.links.values()) link.close();
    this.links.clear();
    for (const wake of this.joinWaiters) wake();
  }

  private update(members: readonly Member[]): void {
    const announced = new Map(members.map((member) => [member.id, member]));
    for (const link of [...this.links.values()]) {
      const member = announced.get(link.id);
      link.announced = member?.address === link.address;
      // A draining worker keeps its link until its stream ends; a restarted one has another address.
      if (!link.announced && (link.linked === undefined || member !== undefined)) {
        this.links.delete(link.id);
        link.close();
      }
    }
    for (const member of members) {
      if (!this.links.has(member.id)) {
        this.links.set(member.id, new WorkerLink(member, this.linkOptions));
      }
    }
  }

  private drop(workerId: string): void {
    const link = this.links.get(workerId);
    if (link !== undefined && !link.announced) {
      this.links.delete(workerId);
      link.close();
    }
  }

  private described(model: GetModelResponse): ServedModel {
    return this.catalogue.add(model, Date.now(), (known) =>
      this.connected().every((worker) => worker.linked.model !== known),
    );
  }
}
