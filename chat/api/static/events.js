// Server-sent events over fetch, read as the HTML standard says.

/** Milliseconds without a word, not even a keep-alive, after which a connection is taken for dead. */
const SILENCE = 60_000;
export const LOST = "The connection was lost.";

/** Ask, as `fetch` does, and give the events of the answer, each `{event, data, id}`. An error is
 * thrown with a message for people and the status as its cause, which is 0 if there was none or the
 * answer broke off; an abort as the signal's reason. */
export async function* eventsOf(address, request) {
  const silence = new AbortController();
  const signal = AbortSignal.any([request.signal, silence.signal]);
  const hear = async (words, failure) => {
    const timer = setTimeout(() => silence.abort(), SILENCE);
    const heard = await words.catch(() => null).finally(() => clearTimeout(timer));
    request.signal.throwIfAborted();
    if (!heard) throw new Error(failure, { cause: 0 });
    return heard;
  };
  try {
    const asked = fetch(address, { ...request, signal });
    const answer = await hear(asked, "The service cannot be reached.");
    if (!answer.ok) {
      // Something in between may answer in the service's place, and with what is no JSON.
      const { error } = await hear(answer.json().catch(() => ({})), LOST);
      const message = error ?? `The service answered with the status ${answer.status}.`;
      throw new Error(message, { cause: answer.status });
    }
    if (answer.status === 204) return yield { data: "[DONE]" }; // which was read before
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    yield* parsed(() => hear(reader.read(), LOST));
  } finally {
    silence.abort();
  }
}

async function* parsed(read) {
  let [rest, event, id, data] = ["", "", "", []];
  for (let part = await read(); !part.done; part = await read()) {
    // A line feed may yet follow a carriage return at the end.
    const lines = (rest + part.value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      const [, field, value] = /^([^:]*)(?:: ?)?(.*)$/s.exec(line);
      if (field === "data") data.push(value);
      else if (field === "event") event = value;
      else if (field === "id" && !value.includes("\0")) id = value;
      else if (line === "") {
        if (data.length > 0) yield { event: event || "message", data: data.join("\n"), id };
        [event, data] = ["", []];
      }
    }
  }
}
