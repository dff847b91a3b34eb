/**
 * GPU time of every dispatch, by the pipeline's label. Wraps a device's command encoders so that each dispatch gets its
 * own pass with timestamps; results stay right, steps get a little slower. For benches only.
 */
const MAX_DISPATCHES = 2048;
const STAMP_BYTES = 8;

export interface DispatchTime {
  readonly label: string;
  readonly dispatches: number;
  readonly milliseconds: number;
}

export interface DispatchProfiler {
  /** Times since the last call, longest first; call it when the submitted work is done. */
  take(): Promise<DispatchTime[]>;
  /** Gives the device its own encoders back. */
  stop(): void;
}

type ImmediatePass = GPUComputePassEncoder & { setImmediates(offset: number, data: Immediates): void };
type Immediates = Uint32Array | ArrayBuffer;

/** Records what a dispatch needs and runs it in a pass of its own. */
function timedPass(encoder: GPUCommandEncoder, querySet: GPUQuerySet, labels: string[]): object {
  let pipeline: GPUComputePipeline | undefined;
  const groups = new Map<number, GPUBindGroup>();
  let immediates: Immediates | undefined;
  return {
    setPipeline: (next: GPUComputePipeline) => {
      pipeline = next;
      immediates = undefined;
    },
    setBindGroup: (index: number, group: GPUBindGroup) => groups.set(index, group),
    setImmediates: (_offset: number, data: Immediates) => {
      immediates = data.slice();
    },
    dispatchWorkgroups: (x: number, y = 1, z = 1) => {
      if (pipeline === undefined) throw new Error("dispatch without a pipeline");
      const index = labels.length * 2;
      if (index + 1 >= MAX_DISPATCHES * 2) throw new RangeError(`over ${MAX_DISPATCHES} dispatches between two takes`);
      labels.push(pipeline.label);
      const pass = encoder.beginComputePass({
        timestampWrites: { querySet, beginningOfPassWriteIndex: index, endOfPassWriteIndex: index + 1 },
      });
      pass.setPipeline(pipeline);
      for (const [slot, group] of groups) pass.setBindGroup(slot, group);
      if (immediates !== undefined) (pass as ImmediatePass).setImmediates(0, immediates);
      pass.dispatchWorkgroups(x, y, z);
      pass.end();
    },
    end: () => undefined,
  };
}

function sumByLabel(labels: readonly string[], stamps: BigUint64Array): DispatchTime[] {
  const sums = new Map<string, { dispatches: number; milliseconds: number }>();
  labels.forEach((label, index) => {
    const sum = sums.get(label) ?? { dispatches: 0, milliseconds: 0 };
    const nanoseconds = Number((stamps[index * 2 + 1] as bigint) - (stamps[index * 2] as bigint));
    sums.set(label, { dispatches: sum.dispatches + 1, milliseconds: sum.milliseconds + nanoseconds / 1e6 });
  });
  const times = [...sums].map(([label, sum]) => ({ label, ...sum }));
  return times.sort((a, b) => b.milliseconds - a.milliseconds);
}

/** @param device must have the feature timestamp-query. */
export function profileDispatches(device: GPUDevice): DispatchProfiler {
  const querySet = device.createQuerySet({ type: "timestamp", count: MAX_DISPATCHES * 2 });
  const bytes = MAX_DISPATCHES * 2 * STAMP_BYTES;
  const resolved = device.createBuffer({ size: bytes, usage: GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC });
  const staging = device.createBuffer({ size: bytes, usage: GPUBufferUsage.COPY_DST | GPUBufferUsage.MAP_READ });
  const labels: string[] = [];
  const create = device.createCommandEncoder.bind(device);
  device.createCommandEncoder = (descriptor) => {
    const encoder = create(descriptor);
    const wrapped: Partial<GPUCommandEncoder> = {
      beginComputePass: () => timedPass(encoder, querySet, labels) as GPUComputePassEncoder,
      copyBufferToBuffer: encoder.copyBufferToBuffer.bind(encoder),
      clearBuffer: encoder.clearBuffer.bind(encoder),
      // A step's own stamps are of passes that are cut up here.
      resolveQuerySet: () => undefined,
      finish: encoder.finish.bind(encoder),
    };
    return wrapped as GPUCommandEncoder;
  };
  return {
    async take() {
      if (labels.length === 0) return [];
      const encoder = create();
      encoder.resolveQuerySet(querySet, 0, labels.length * 2, resolved, 0);
      encoder.copyBufferToBuffer(resolved, 0, staging, 0, labels.length * 2 * STAMP_BYTES);
      device.queue.submit([encoder.finish()]);
      await staging.mapAsync(GPUMapMode.READ);
      const stamps = new BigUint64Array(staging.getMappedRange(0, labels.length * 2 * STAMP_BYTES)).slice();
      staging.unmap();
      return sumByLabel(labels.splice(0), stamps);
    },
    stop() {
      device.createCommandEncoder = create;
      querySet.destroy();
      resolved.destroy();
      staging.destroy();
    },
  };
}
