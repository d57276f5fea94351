// Everything that goes over the network; all of it to the server that sent this page.

const KEY = "moestream.key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function apiKey() {
  return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
}

export function keyRemembered() {
  return localStorage.getItem(KEY) !== null;
}

export function setApiKey(key, remember) {
  sessionStorage.removeItem(KEY);
  localStorage.removeItem(KEY);
  if (key) (remember ? localStorage : sessionStorage).setItem(KEY, key);
}

async function send(path, { body, signal, accept } = {}) {
  const headers = {};
  if (apiKey()) headers["x-api-key"] = apiKey();
  if (accept) headers.accept = accept;
  if (body) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (answer.ok) return answer;
  let message = `The server answered ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // not an error of the API: the status must do
  }
  const again = answer.headers.get("retry-after");
  throw new ApiError(answer.status, again ? `${message} (again in ${again} s)` : message);
}

/** The data of server-sent events, as they come; the server writes each on one line. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = ""; ; ) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(0, "The connection to the server was lost.");
      }
      if (part.done) return;
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Names of the model. */
export async function models() {
  return (await (await send("/v1/models")).json()).data.map((model) => model.id);
}

/** Chunks of a streamed reply. */
export async function* chat(body, signal) {
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  for await (const data of events(await send("/v1/chat/completions", { body: whole, signal }))) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, chunk.error.message);
    yield chunk;
  }
  throw new ApiError(0, "The connection ended before the reply did.");
}

/** What the machine does, four times a second. */
export async function* live(signal) {
  const answer = await send("/v1/moestream/live", { signal, accept: "text/event-stream" });
  for await (const data of events(answer)) yield JSON.parse(data);
}
