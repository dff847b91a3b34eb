/** Every list of cases that the bench runs, in the order of its table. A new file in this folder gets a line here. */
import type { CaseList } from "../kernel-case.ts";
import { decodeAttentionCases } from "./decode-attention.ts";
import { decodeLinearCases } from "./decode-linear.ts";
import { elementwiseCases } from "./elementwise.ts";
import { gemmCases } from "./gemm.ts";
import { prefillAttentionCases } from "./prefill-attention.ts";
import { samplingCases } from "./sampling.ts";
import { sealCases } from "./seal.ts";

export const CASE_LISTS: readonly CaseList[] = [
  decodeAttentionCases,
  prefillAttentionCases,
  sealCases,
  samplingCases,
  decodeLinearCases,
  gemmCases,
  elementwiseCases,
];
