/* Search without a server: a page opened from a file may not start a Worker, but it may own a frame.
 * This class speaks a Worker's protocol (postMessage, "message" events) to a script in a frame. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      // importScripts answers with a promise here; the search script awaits it.
      frame.srcdoc = `<script>
        const toPage = message => parent.postMessage(message, "*")
        self.postMessage = toPage
        self.importScripts = (...urls) => urls.reduce((done, url) => done.then(() =>
          new Promise((loaded, failed) => {
            const script = Object.assign(document.createElement("script"), {src: url})
            script.onload = loaded
            script.onerror = failed
            document.head.append(script)
          })), Promise.resolve())
      <\/script><script src="${url}"><\/script>`
      this.ready = new Promise(resolve => { frame.onload = resolve })
      this.frame = frame
      window.addEventListener("message", event => {
        if (event.source !== frame.contentWindow) return
        event.stopImmediatePropagation()
        const message = new MessageEvent("message", { data: event.data })
        this.dispatchEvent(message)
        this.onmessage?.(message)
      })
      document.documentElement.append(frame)
    }
    postMessage(message) {
      this.ready.then(() => {
        const event = new this.frame.contentWindow.MessageEvent("message", { data: message })
        this.frame.contentWindow.dispatchEvent(event)
      })
    }
    terminate() { this.frame.remove() }
  }
}
