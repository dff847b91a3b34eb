import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { planStep, type RunningView, type SchedulerLimits, sealedPages } from "./scheduler.ts";

const limits: SchedulerLimits = {
  residualTokens: 128,
  blockTokens: 32,
  maxPrefillRows: 256,
  maxSequences: 4,
  decodeStepsPerPrefill: 2,
  prefillPatience: 0,
  decodeSteps: 1,
};

const nothing = { limits, running: [], waiting: [], availablePages: 100, stepsSincePrefill: 0 };
const waiting = (id: string, prefillEnd: number, hitPages = 0) => ({
  id,
  prefillEnd,
  hitPages,
  hitAvailable: hitPages,
});
const decoding = (id: string, computed: number, decodeSteps = 100): RunningView => {
  const pages = sealedPages(computed, limits);
  return { id, computed, prefillEnd: 1, decodeSteps, pages, ownPages: pages };
};

describe("planStep", () => {
  it("has nothing to do without sequences", () => {
    expect(planStep(nothing)).toEqual({ preempt: [], admit: [], prefill: [], decode: [], decodeSteps: 1 });
  });

  it("packs whole prompts into a step and cuts the next at a multiple of R", () => {
    const plan = planStep({ ...nothing, waiting: [waiting("a", 100), waiting("b", 300), waiting("c", 20)] });
    expect(plan.prefill).toEqual([
      { id: "a", start: 0, end: 100 },
      { id: "b", start: 0, end: 128 },
      { id: "c", start: 0, end: 20 },
    ]);
    expect(plan.admit).toEqual(["a", "b", "c"]);
  });

  it("starts behind the prefix that the pool holds", () => {
    const plan = planStep({ ...nothing, waiting: [waiting("a", 300, 8)] });
    expect(plan.prefill).toEqual([{ id: "a", start: 256, end: 300 }]);
  });

  it("runs every decode row beside a prefill chunk, but not in every step", () => {
    const running = [decoding("a", 5), decoding("b", 200)];
    const busy = { ...nothing, running, waiting: [waiting("c", 64)] };
    expect(planStep({ ...busy, stepsSincePrefill: 2 })).toMatchObject({ decode: ["a", "b"], admit: ["c"] });
    expect(planStep({ ...busy, stepsSincePrefill: 1 })).toMatchObject({ decode: ["a", "b"], admit: [], prefill: [] });
  });

  it("admits nobody whose whole prefill does not fit, nor anybody behind", () => {
    const plan = planStep({ ...nothing, availablePages: 7, waiting: [waiting("a", 256), waiting("b", 10)] });
    expect(plan.admit).toEqual([]);
  });

  it("keeps the pages that an unfinished prefill still needs from newcomers", () => {
    const running = [{ id: "a", computed: 0, prefillEnd: 512, decodeSteps: 9, pages: 0, ownPages: 0 }];
    const plan = planStep({ ...nothing, running, availablePages: 19, waiting: [waiting("b", 128)] });
    expect(plan).toMatchObject({ admit: [], prefill: [{ id: "a", start: 0, end: 256 }] });
  });

  it("preempts the youngest when a decode row seals and no page is free", () => {
    const running = [decoding("old", 127), decoding("middle", 130), decoding("young", 256)];
    const plan = planStep({ ...nothing, running, availablePages: 0 });
    expect(plan).toMatchObject({ preempt: ["young"], decode: ["old", "middle"] });
  });

  it("leaves a starved sequence alone if nobody younger can make room", () => {
    const running = [decoding("old", 300), decoding("young", 127)];
    const plan = planStep({ ...nothing, running, availablePages: 3, waiting: [waiting("next", 10)] });
    expect(plan).toEqual({ preempt: [], admit: [], prefill: [], decode: ["old"], decodeSteps: 1 });
  });

  describe("with patience", () => {
    const patient = { ...nothing, limits: { ...limits, decodeStepsPerPrefill: 0, prefillPatience: 4, decodeSteps: 8 } };
    const busy = { ...patient, running: [decoding("a", 5)] };

    it("lets a small prefill wait for more while something decodes, but no longer than that", () => {
      const small = { ...busy, waiting: [waiting("b", 64)] };
      expect(planStep({ ...small, stepsSincePrefill: 0 })).toMatchObject({ prefill: [], decodeSteps: 4 });
      expect(planStep({ ...small, stepsSincePrefill: 3 })).toMatchObject({ prefill: [], decodeSteps: 1 });
      expect(planStep({ ...small, stepsSincePrefill: 4 })).toMatchObject({ admit: ["b"], decodeSteps: 1 });
      expect(planStep({ ...patient, waiting: [waiting("b", 64)] })).toMatchObject({ admit: ["b"] });
    });

    it("does not let half a budget wait, nor what has begun", () => {
      const many = { ...busy, waiting: [waiting("b", 64), waiting("c", 64)] };
      expect(planStep(many)).toMatchObject({ admit: ["b", "c"], decodeSteps: 1 });
      const half = { id: "half", computed: 128, prefillEnd: 512, decodeSteps: 9, pages: 4, ownPages: 4 };
      expect(planStep({ ...busy, running: [...busy.running, half] }).prefill).toHaveLength(1);
    });

    it("counts only what has room", () => {
      const many = { ...busy, waiting: [waiting("b", 64), waiting("c", 256)] };
      expect(planStep({ ...many, availablePages: 7 })).toMatchObject({ prefill: [], decodeSteps: 4 });
      const slots = { ...busy.limits, maxSequences: 2 };
      expect(planStep({ ...many, limits: slots })).toMatchObject({ prefill: [], decodeSteps: 4 });
    });
  });

  describe("with several decode steps at once", () => {
    const ahead = { ...nothing, limits: { ...limits, decodeSteps: 8 } };
    const old = decoding("old", 5);

    it("takes as many as no row ends within, and leaves out rows that have nothing left to do", () => {
      const running = [old, decoding("ending", 300, 3), decoding("under way", 9, 0)];
      expect(planStep({ ...ahead, running })).toMatchObject({ decode: ["old", "ending"], decodeSteps: 3 });
      expect(planStep({ ...ahead, running: [old] })).toMatchObject({ decode: ["old"], decodeSteps: 8 });
      expect(planStep({ ...ahead, running: running.slice(2) })).toMatchObject({ decode: [] });
    });

    it("takes no more than prefill may have to wait for, and one beside it", () => {
      const busy = { ...ahead, running: [old], waiting: [waiting("new", 64)] };
      expect(planStep({ ...busy, stepsSincePrefill: 0 })).toMatchObject({ decodeSteps: 2, prefill: [] });
      expect(planStep({ ...busy, stepsSincePrefill: 1 })).toMatchObject({ decodeSteps: 1, prefill: [] });
      expect(planStep({ ...busy, stepsSincePrefill: 2 })).toMatchObject({ decodeSteps: 1, admit: ["new"] });
      const prefilling = { ...old, id: "half", computed: 128, prefillEnd: 512, pages: 4 };
      expect(planStep({ ...ahead, running: [old, prefilling] })).toMatchObject({ decodeSteps: 2, prefill: [] });
    });

    it("does not hold back for one that cannot start", () => {
      const full = { ...ahead, running: [old], waiting: [waiting("large", 4096)], stepsSincePrefill: 9 };
      expect(planStep(full)).toMatchObject({ decodeSteps: 8, admit: [] });
      const taken = { ...full, limits: { ...ahead.limits, maxSequences: 1 }, waiting: [waiting("new", 64)] };
      expect(planStep(taken)).toMatchObject({ decodeSteps: 8, admit: [] });
    });

    it("takes fewer before it preempts", () => {
      const running = [decoding("old", 124), decoding("young", 126)];
      expect(planStep({ ...ahead, running })).toMatchObject({ decodeSteps: 8, preempt: [] });
      // Eight and four steps fill windows of both, two fill the younger one's, one fills none.
      expect(planStep({ ...ahead, running, availablePages: 4 })).toMatchObject({ decodeSteps: 2, preempt: [] });
      expect(planStep({ ...ahead, running, availablePages: 0 })).toMatchObject({ decodeSteps: 1, preempt: [] });
    });
  });
});

interface Simulated {
  id: string;
  prompt: number;
  output: number;
  computed: number;
  pages: number;
  arrival: number;
}

/** Runs sequences to their end over a pool of private pages; returns the steps taken. */
function simulate(size: { numPages: number; limits: SchedulerLimits }, requests: readonly [number, number][]): number {
  const { numPages, limits: bounds } = size;
  let waitingList: Simulated[] = requests.map(([prompt, output], arrival) => ({
    id: `s${arrival}`,
    prompt,
    output,
    computed: 0,
    pages: 0,
    arrival,
  }));
  let running: Simulated[] = [];
  let available = numPages;
  let stepsSincePrefill = 0;
  let steps = 0;
  while (waitingList.length + running.length > 0) {
    expect(++steps).toBeLessThan(20_000);
    const byAge = (left: Simulated, right: Simulated) => left.arrival - right.arrival;
    running.sort(byAge);
    waitingList.sort(byAge);
    const plan = planStep({
      limits: bounds,
      availablePages: available,
      stepsSincePrefill,
      running: running.map((s) => {
        return { ...s, prefillEnd: s.prompt, decodeSteps: s.prompt + s.output - s.computed, ownPages: s.pages };
      }),
      waiting: waitingList.map((s) => ({ id: s.id, prefillEnd: s.prompt, hitPages: 0, hitAvailable: 0 })),
    });
    const all = new Map([...running, ...waitingList].map((s) => [s.id, s]));
    if (running.length > 0) expect(plan.preempt).not.toContain(running[0]!.id);
    for (const id of plan.preempt) {
      const s = all.get(id)!;
      available += s.pages;
      Object.assign(s, { pages: 0, computed: 0 });
      running = running.filter((other) => other !== s);
      waitingList.push(s);
    }
    for (const id of plan.admit) {
      running.push(all.get(id)!);
      waitingList = waitingList.filter((s) => s.id !== id);
    }
    expect(running.length).toBeLessThanOrEqual(bounds.maxSequences);
    const rows = plan.prefill.reduce((sum, chunk) => sum + chunk.end - chunk.start, 0);
    expect(rows).toBeLessThanOrEqual(bounds.maxPrefillRows);
    const advance = (s: Simulated, computed: number) => {
      const pages = sealedPages(computed, bounds);
      available -= pages - s.pages;
      s.pages = pages;
      s.computed = computed;
      expect(available).toBeGreaterThanOrEqual(0);
    };
    for (const { id, start, end } of plan.prefill) {
      const s = all.get(id)!;
      expect(running).toContain(s);
      expect(start).toBe(s.computed);
      expect(start % bounds.residualTokens).toBe(0);
      expect(end === s.prompt || end % bounds.residualTokens === 0).toBe(true);
      advance(s, end);
    }
    for (const id of plan.decode) {
      const s = all.get(id)!;
      expect(running).toContain(s);
      expect(s.computed).toBeGreaterThanOrEqual(s.prompt);
      advance(s, s.computed + plan.decodeSteps);
      expect(s.computed).toBeLessThanOrEqual(s.prompt + s.output);
    }
    expect(plan.prefill.length + plan.decode.length + plan.preempt.length).toBeGreaterThan(0);
    if (plan.prefill.length > 0) expect(plan.decodeSteps).toBe(1);
    stepsSincePrefill = plan.prefill.length > 0 ? 0 : stepsSincePrefill + plan.decodeSteps;
    for (const s of running.filter((done) => done.computed >= done.prompt + done.output)) available += s.pages;
    running = running.filter((s) => s.computed < s.prompt + s.output);
  }
  expect(available).toBe(numPages);
  return steps;
}

describe("a scheduler's run", () => {
  it("finishes every sequence that fits the pool alone, within the budgets, and returns every page", () => {
    const shape = fc.record({
      window: fc.constantFrom([32, 32], [64, 32], [128, 128]),
      windows: fc.integer({ min: 2, max: 8 }),
      maxSequences: fc.integer({ min: 1, max: 5 }),
      rowWindows: fc.integer({ min: 1, max: 4 }),
      decodeStepsPerPrefill: fc.integer({ min: 0, max: 3 }),
      decodeSteps: fc.constantFrom(1, 4, 16),
      prefillPatience: fc.integer({ min: 0, max: 9 }),
    });
    const request = fc.tuple(fc.double({ min: 0, max: 1, noNaN: true }), fc.double({ min: 0, max: 1, noNaN: true }));
    fc.assert(
      fc.property(shape, fc.array(request, { minLength: 1, maxLength: 10 }), (size, fractions) => {
        const [residualTokens, blockTokens] = size.window as [number, number];
        const numPages = (size.windows * residualTokens) / blockTokens;
        const capacity = size.windows * residualTokens + residualTokens - 1;
        const requests = fractions.map(([prompt, output]): [number, number] => {
          const tokens = 1 + Math.floor(prompt * (capacity - 1));
          return [tokens, Math.floor(output * (capacity - tokens))];
        });
        const maxPrefillRows = size.rowWindows * residualTokens;
        const { maxSequences, decodeStepsPerPrefill, decodeSteps, prefillPatience } = size;
        const turns = { decodeStepsPerPrefill, decodeSteps, prefillPatience };
        const bounds = { residualTokens, blockTokens, maxPrefillRows, maxSequences, ...turns };
        simulate({ numPages, limits: bounds }, requests);
      }),
      { numRuns: 100 },
    );
  });
});
