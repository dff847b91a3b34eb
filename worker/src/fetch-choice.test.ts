import { expect, it } from "vitest";
import { fetchRateLifeSeconds, MeasuredRate, worthFetching } from "./fetch-choice.ts";

const estimate = {
  tokens: 256,
  bytes: 1e6,
  prefillTokensPerSecond: 50,
  fetchBytesPerSecond: 1e8,
  fetchRateAgeSeconds: 0,
  fetchSeconds: 0.01,
};

it("fetches where that is faster than prefill, and where a rate is not known", () => {
  expect(worthFetching(estimate)).toBe(true);
  expect(worthFetching({ ...estimate, prefillTokensPerSecond: 1e6 })).toBe(false);
  expect(worthFetching({ ...estimate, prefillTokensPerSecond: 1e6, fetchBytesPerSecond: 0 })).toBe(true);
  expect(worthFetching({ ...estimate, prefillTokensPerSecond: 0, fetchBytesPerSecond: 1 })).toBe(true);
});

it("fetches again once a rate that speaks against it is old", () => {
  const slow = { ...estimate, fetchBytesPerSecond: 1 };
  expect(worthFetching(slow)).toBe(false);
  expect(worthFetching({ ...slow, fetchRateAgeSeconds: fetchRateLifeSeconds - 1 })).toBe(false);
  expect(worthFetching({ ...slow, fetchRateAgeSeconds: fetchRateLifeSeconds })).toBe(true);
});

it("follows a rate and ignores empty measurements", () => {
  const rate = new MeasuredRate();
  rate.add(0, 1);
  expect(rate.value).toBe(0);
  rate.add(100, 1);
  rate.add(200, 1);
  expect(rate.value).toBe(125);
  rate.forget();
  expect(rate.value).toBe(0);
});
