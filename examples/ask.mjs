// One question over the event stream, in Node 18 or newer:  node ask.mjs [URL [QUESTION]]

import { randomUUID } from "node:crypto";

const [url = "http://localhost:8000", question = "Hello!"] = process.argv.slice(2);

/** Yield the reply's tokens as they come. */
async function* reply(question, conversation) {
  const answer = await fetch(`${url.replace(/\/$/, "")}/chat`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify({ messages: [{ role: "user", content: question }], conversation }),
  });
  if (!answer.ok) throw new Error((await answer.json()).error);
  for await (const { name, data } of events(answer.body.pipeThrough(new TextDecoderStream()))) {
    if (name === "error") throw new Error(JSON.parse(data).error);
    if (data === "[DONE]") return;
    yield name === "truncated" ? ` (truncated: ${JSON.parse(data).reason})` : data;
  }
  throw new Error("the connection broke before the end of the reply");
}

/** Parse an event stream: yield the name and the data of each event. */
async function* events(pieces) {
  let [rest, name, data] = ["", "message", []];
  for await (const piece of pieces) {
    const lines = (rest + piece).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const [field] = line.split(":", 1);
      const value = line.slice(field.length + 1).replace(/^ /, "");
      if (field === "event") name = value;
      else if (field === "data") data.push(value);
      else if (line === "") {
        if (data.length) yield { name, data: data.join("\n") };
        [name, data] = ["message", []];
      }
    }
  }
}

// Anyone who knows the conversation's id can read it.
try {
  for await (const token of reply(question, randomUUID())) process.stdout.write(token);
  console.log();
} catch (error) {
  console.error(`error: ${error.cause?.message ?? error.message}`);
  process.exitCode = 1;
}
