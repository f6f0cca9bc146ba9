// What /v1/status and its history answer, as far as the page reads it: penstock/status.py tells what each means.

export interface Memory {
  owners: Record<string, number>;
  held: number;
  budget: number | null;
  budget_decided_by: string;
  ceiling: number | null;
  ceiling_decided_by: string;
  front_held: number;
}

export interface Request {
  id: string;
  path: string;
  stream: boolean;
  stage: string;
  seconds: number;
  prompt: number;
  cached: number;
  why: string;
  prefilled: number;
  eta: number | null;
  generated: number;
  max_tokens: number | null;
  tokens_per_second: number | null;
  bytes: number | null;
  preempted: boolean;
  restarts: number;
}

export interface Prefix {
  id: number;
  parent: number | null;
  start: number;
  tokens: number;
  bytes: number;
  hits: number;
  age: number;
  borrowed: boolean;
}

export interface Cache {
  bytes: number;
  tokens: number;
  nodes: number;
  entries: number;
  queries: number;
  hits: number;
  evicted: Record<string, number>;
  tree: Prefix[];
}

export interface Event {
  time: number;
  kind: string;
  level: string;
  message: string;
  advice: string;
  count: number;
}

export interface Ready {
  context_length: number;
  longest: number;
  device: string;
  backend: string;
}

export interface Status {
  model: string;
  state: string;
  reason: string | null;
  stage: string;
  time: number;
  uptime: number;
  versions: Record<string, string>;
  facts: Ready | null;
  memory: Memory;
  running: number;
  queued: number;
  requests: Request[];
  cache: Cache;
  finished: Record<string, number>;
  events: Event[];
}

export interface Mark {
  time: number;
  kind: string;
  count: number;
}

export interface History {
  interval: number;
  time: number[];
  budget: (number | null)[];
  owners: Record<string, number[]>;
  running: number[];
  queued: number[];
  prompt_tokens: number[];
  generated_tokens: number[];
  marks: Mark[];
}
