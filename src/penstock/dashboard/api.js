// Requests to this server. The API key lives in this module's memory alone, and is gone with the page.

/** @typedef {import("./shapes.js").Status} Status */
/** @typedef {import("./shapes.js").History} History */

const TIMEOUT = 8000;
let key = "";

/** An answer that is an error: its status and the server's words. 0: nobody answered. */
export class Refused extends Error {
  /** @param {number} status @param {string} message */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** @param {string} given */
export function useKey(given) {
  key = given;
}

export const hasKey = () => key !== "";

/** The base URL that clients are given. */
export const base = location.origin;

/**
 * The answer, whose status is good. Rejects with Refused.
 * @param {string} path @param {unknown} [body] a POST of it @param {AbortSignal} [signal] in place of a time limit
 */
export async function ask(path, body, signal) {
  /** @type {Record<string, string>} */
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  /** @type {RequestInit} */
  const options = { headers, cache: "no-store", signal: signal ?? AbortSignal.timeout(TIMEOUT) };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    options.method = "POST";
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refused(0, "The server does not answer.");
  }
  if (!answer.ok) throw new Refused(answer.status, await words(answer));
  return answer;
}

/** The server's words on an error. @param {Response} answer */
async function words(answer) {
  try {
    return String((await answer.json()).error.message);
  } catch {
    return `The server answered with status ${answer.status}.`;
  }
}

/** @param {string} path */
async function read(path) {
  const answer = await ask(path);
  try {
    return await answer.json();
  } catch {
    throw new Refused(0, "The server's answer broke off.");
  }
}

/** @returns {Promise<Status>} */
export const status = () => read("/v1/status");

/** @param {number} since @returns {Promise<History>} */
export const history = (since) => read(`/v1/status/history?since=${since}`);

/** @param {string} id */
export const cancel = (id) => ask(`/v1/requests/${encodeURIComponent(id)}/cancel`, {});

export const clearCache = () => ask("/v1/cache/clear", {});

/**
 * The JSON of a stream's events, until [DONE]. Rejects with Refused on an error event.
 * @param {string} path @param {unknown} body @param {AbortSignal} signal
 */
export async function* stream(path, body, signal) {
  const answer = await ask(path, body, signal);
  if (!answer.body) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused(0, "The connection ended before the answer did.");
    text += value;
    const lines = text.split("\n");
    text = lines.pop() ?? "";
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refused(200, String(event.error.message));
      yield event;
    }
  }
}
