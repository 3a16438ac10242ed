// One question over an event stream, in Node 18 or newer:  node ask.mjs [URL QUESTION]

import { randomUUID } from "node:crypto";

const [url = "http://localhost:8000", question = "Hello!"] = process.argv.slice(2);
const messages = [{ role: "user", content: question }];
const conversation = randomUUID(); // anyone who knows it can read the conversation

/** Yield the name and the data of each event. */
async function* events(pieces) {
  let rest = "";
  for await (const piece of pieces) {
    const blocks = (rest + piece).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const values = (field) =>
        block.split("\n").filter((line) => line.startsWith(field)).map((line) => line.slice(field.length));
      yield [values("event: ")[0], values("data: ").join("\n")];
    }
  }
}

try {
  const body = JSON.stringify({ messages, conversation, stream: true });
  const answer = await fetch(`${url}/chat`, { method: "POST", body });
  if (!answer.ok) throw new Error((await answer.json()).error);
  let isComplete = false;
  for await (const [name, data] of events(answer.body.pipeThrough(new TextDecoderStream()))) {
    if (name === "error") throw new Error(JSON.parse(data).error);
    else if (name === "truncated") process.stdout.write(` (truncated: ${JSON.parse(data).reason})`);
    else if (data === "[DONE]") isComplete = true;
    else process.stdout.write(data);
  }
  if (!isComplete) throw new Error("the connection broke before the end of the reply");
} catch (error) {
  console.error(`error: ${error.cause?.message ?? error.message}`);
  process.exitCode = 1;
}
